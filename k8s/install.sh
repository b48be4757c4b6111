#!/bin/bash
# Installs Shoal into a prefix of its own, a plain one: nothing in it points back here. The image is made by this, and a test of the image too.
#
#   k8s/install.sh PREFIX [dependencies|shoal]
#
# dependencies  a Python environment with exactly what constraints.txt names (changes seldom: a layer that nodes keep)
# shoal         Shoal itself, and the bytecode of all of it
# By default both. Then, as the user that will serve, `PREFIX/bin/python -m cluster.precompile` keeps its machine code in NUMBA_CACHE_DIR.
#
# PYTHON           the interpreter, with pip                                            [python3]
# ACCELERATOR      cpu or gpu: another build of torch than that is refused              [whatever build comes]
# TORCH_INDEX_URL  where torch comes from, an index as PyTorch has one for each CUDA    [pip's own]
# EXTRAS           of pyproject.toml: `demo` can write the demo model, and has its 93 MB inside  [none]
set -euo pipefail

source_dir=$(cd "$(dirname "$0")/.." && pwd)
prefix=${1:?"which prefix? usage: $0 PREFIX [dependencies|shoal]"}
part=${2:-all}
python=${PYTHON:-python3}
site() { "$prefix/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# The prefix's own pip would be 15 MB that nobody calls; bytecode is written afterwards, on all cores and only where it is used.
pip_install() {
    "$python" -m pip --python "$prefix/bin/python" --disable-pip-version-check install \
        --quiet --no-compile --no-cache-dir --root-user-action ignore -c "$source_dir/constraints.txt" "$@"
}

# A process that imports a module without bytecode compiles it again each time: a user that serves cannot write here.
# Left out: what neither Shoal nor the parts of Ray that it uses ever import; that is half of the files.
compile_bytecode() {
    "$prefix/bin/python" -m compileall -q -j 0 \
        -x 'site-packages/(.*/tests|transformers/(models|integrations|quantizers|pipelines|commands|cli)|sympy|networkx|numba/cuda|ray/(rllib|tune|train|llm|data)|torch/(_inductor|_dynamo|testing|onnx|ao|distributed|fx)|setuptools|pygments|virtualenv)/' \
        "$@"
}

install_dependencies() {
    "$python" -m venv --without-pip --clear "$prefix"
    # First, and alone: its index has little else, and what it has else need not be what constraints.txt means.
    pip_install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
    check_torch
    "$python" - "$source_dir/pyproject.toml" ${EXTRAS:+"$EXTRAS"} <<'LIST' >"$prefix/requirements.txt"
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = [extra for text in sys.argv[2:] for extra in text.split(",")]
print("\n".join([*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]))
LIST
    pip_install -r "$prefix/requirements.txt"
    rm "$prefix/requirements.txt"
    slim
    compile_bytecode "$(site)"
}

check_torch() {
    local found
    found=$("$prefix/bin/python" -W ignore -c 'import torch; print("gpu" if torch.version.cuda else "cpu")')
    if [ "${ACCELERATOR:-$found}" != "$found" ]; then
        echo "$0: torch is a build for $found, wanted is one for $ACCELERATOR: give TORCH_INDEX_URL an index that has it" >&2
        exit 1
    fi
}

# What serving never opens: tests, C++ headers and programs of torch, Ray's Java. 230 MB.
slim() {
    local packages
    packages=$(site)
    rm -rf "$packages"/torch/{test,include,share} "$packages/ray/jars" "$packages"/numba/{tests,cuda/tests}
    find "$packages/torch/bin" -type f ! -name torch_shm_manager -delete
}

install_shoal() {
    # From a copy: a build leaves its traces in the source, and takes old ones along.
    local copy
    copy=$(mktemp -d)
    trap "rm -rf '$copy'" EXIT
    cp -R "$source_dir"/{pyproject.toml,README.md,LICENSE,model,router,actors,cluster} "$copy"
    # The environment's setuptools, which is pinned; nothing is downloaded any more.
    pip_install --no-deps --no-index --no-build-isolation "$copy"
    compile_bytecode "$(site)"/{model,router,actors,cluster}
    sed "1s|.*|#!$prefix/bin/python|" "$source_dir/k8s/model_init.py" >"$prefix/bin/shoal-model-init"
    chmod 755 "$prefix/bin/shoal-model-init"
}

case $part in
    dependencies) install_dependencies ;;
    shoal) install_shoal ;;
    all)
        install_dependencies
        install_shoal
        ;;
    *)
        echo "$0: no part is called $part" >&2
        exit 2
        ;;
esac
