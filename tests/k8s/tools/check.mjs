// Objects of Gateway API and the Prometheus operator as JSON on stdin; a list of complaints for each on stdout.
// The packages' validators know values but let unknown fields pass; their types know the fields: TypeScript refuses one too many.
import { readFileSync } from "node:fs";
import ts from "typescript";

const PACKAGES = {
  "gateway.networking.k8s.io": "@kubernetes-models/gateway-api",
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
};

async function values({ module, object }) {
  const { [object.kind]: Model } = await import(module);
  if (Model === undefined) return [`${module} has no ${object.kind}`];
  try {
    new Model(object).validate();
    return [];
  } catch (error) {
    return [error.message];
  }
}

function fields(given) {
  const name = (index) => `${import.meta.dirname}/object${index}.ts`;
  const texts = new Map(
    given.map(({ module, object }, index) => [
      name(index),
      `import type { I${object.kind} } from "${module}";\nexport const object: I${object.kind} = ${JSON.stringify(object)};\n`,
    ]),
  );
  const options = { module: ts.ModuleKind.NodeNext, moduleResolution: ts.ModuleResolutionKind.NodeNext, noEmit: true, skipLibCheck: true, strict: true, types: [] };
  const host = ts.createCompilerHost(options);
  const { fileExists, readFile, getSourceFile } = host;
  host.fileExists = (file) => texts.has(file) || fileExists(file);
  host.readFile = (file) => texts.get(file) ?? readFile(file);
  host.getSourceFile = (file, version) => (texts.has(file) ? ts.createSourceFile(file, texts.get(file), version) : getSourceFile(file, version));
  const program = ts.createProgram([...texts.keys()], options, host);
  return given.map((_, index) =>
    ts.getPreEmitDiagnostics(program, program.getSourceFile(name(index))).map((one) => ts.flattenDiagnosticMessageText(one.messageText, " ")),
  );
}

const given = JSON.parse(readFileSync(0, "utf8")).map((object) => {
  const [group, version] = object.apiVersion.split("/");
  return { module: `${PACKAGES[group]}/${group}/${version}`, object };
});
const types = fields(given);
const complaints = await Promise.all(given.map(async (one, index) => [...(await values(one)), ...types[index]]));
process.stdout.write(JSON.stringify(complaints));
