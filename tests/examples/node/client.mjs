// A client of shoal.v1 in Node, from the .proto file alone: npm ci && node client.mjs PROTO_DIRECTORY ADDRESS PROMPT [APPLICATION]
//
// Prints one JSON object a line: the model, a streamed answer, two answers over one call, and how a mistake is told.
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [protoDirectory, address, prompt, application] = process.argv.slice(2);
const definition = loader.loadSync("shoal/v1/inference.proto", { includeDirs: [protoDirectory], keepCase: true, defaults: true, longs: Number, enums: String });
const { Inference } = grpc.loadPackageDefinition(definition).shoal.v1;
const client = new Inference(address, grpc.credentials.createInsecure());
const sampling = { temperature: 0, max_tokens: 24 };

function metadata() {
  const entries = new grpc.Metadata();
  entries.set("x-request-id", "node-example");
  if (application) entries.set("application", application);
  if (process.env.SHOAL_API_KEY) entries.set("authorization", `Bearer ${process.env.SHOAL_API_KEY}`);
  return entries;
}

const deadline = () => new Date(Date.now() + 60_000);
const say = (name, value) => console.log(JSON.stringify({ [name]: value }));

function models() {
  return new Promise((resolve, reject) => {
    client.ListModels({}, metadata(), { deadline: deadline() }, (error, answer) => (error ? reject(error) : resolve(answer.models)));
  });
}

async function generate() {
  const answer = { text: "", finish_reason: null, usage: null };
  const call = client.Generate({ text: prompt, sampling }, metadata(), { deadline: deadline() });
  for await (const delta of call) {
    answer.text += delta.text;
    if (delta.usage) Object.assign(answer, { finish_reason: delta.finish_reason, usage: delta.usage });
  }
  return answer;
}

// Many requests over one call: `write` waits by itself where the server does, and answers come interleaved.
async function batch() {
  const texts = { first: "", second: "" };
  const call = client.GenerateBatch(metadata(), { deadline: deadline() });
  for (const id of Object.keys(texts)) call.write({ id, generate: { text: prompt, sampling } });
  call.end();
  for await (const response of call) {
    if (response.error) throw new Error(response.error.message);
    texts[response.id] += response.delta.text;
  }
  return texts;
}

function mistake() {
  return new Promise((resolve) => {
    const call = client.Generate({ text: prompt, sampling: { temperature: -1 } }, metadata(), { deadline: deadline() });
    call.on("data", () => {});
    call.on("error", (error) => resolve({ code: error.code, kind: error.metadata.get("shoal-error-kind")[0], id: error.metadata.get("x-request-id")[0] }));
  });
}

say("models", await models());
say("answer", await generate());
say("batch", await batch());
say("mistake", await mistake());
client.close();
