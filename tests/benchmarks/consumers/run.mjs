// Read the towers of each case with transformers.js: node run.mjs CASES OUT.json, as run_towers.py
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import {
  AutoProcessor,
  AutoTokenizer,
  CLIPTextModelWithProjection,
  CLIPVisionModelWithProjection,
  RawImage,
  Tensor,
  env,
  pipeline,
} from "@huggingface/transformers";

const [cases, out] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = `${resolve(cases)}/`;
const rows = [];

/** Add one row: what `embed` returns, or why it failed. */
async function row(model, reader, tower, given, embed) {
  const found = { embeddings: null, ids: null, pixels: null, why: "" };
  try {
    Object.assign(found, await embed());
  } catch (error) {
    found.why = `${error.name}: ${error.message}`;
  }
  rows.push({ model, reader, tower, given, ...found });
}

function pixelTensor({ pixel_values: values, size }) {
  return new Tensor("float32", Float32Array.from(values), [values.length / (3 * size * size), 3, size, size]);
}

function idTensor({ input_ids: ids }) {
  return new Tensor("int64", BigInt64Array.from(ids.flat().map(BigInt)), [ids.length, ids[0].length]);
}

async function texts(name, given) {
  const load = () => CLIPTextModelWithProjection.from_pretrained(`${name}/model`, { dtype: "fp32" });
  const embed = async (inputs) => (await (await load())(inputs)).text_embeds.tolist();
  const own = async (captions) => {
    const tokenizer = await AutoTokenizer.from_pretrained(`${name}/model`);
    const inputs = tokenizer(captions, { padding: true, truncation: true });
    const ids = inputs.input_ids.tolist().map((line) => line.map(Number));
    return { embeddings: await embed(inputs), ids };
  };
  const reader = "CLIPTextModelWithProjection";
  const same = async () => ({ embeddings: await embed({ input_ids: idTensor(given) }) });
  await row(name, reader, "text", "same", same);
  for (const [kind, captions] of Object.entries(given.captions)) {
    await row(name, reader, "text", kind, () => own(captions));
  }
}

async function images(name, given, folder) {
  const load = () => CLIPVisionModelWithProjection.from_pretrained(`${name}/model`, { dtype: "fp32" });
  const embed = async (pixel_values) => (await (await load())({ pixel_values })).image_embeds.tolist();
  const read = (kind) => Promise.all(given.images[kind].map((image) => RawImage.read(join(folder, image))));
  const own = async (kind) => {
    const processor = await AutoProcessor.from_pretrained(`${name}/model`);
    const { pixel_values } = await processor(await read(kind));
    return { embeddings: await embed(pixel_values), pixels: Array.from(pixel_values.data) };
  };
  const reader = "CLIPVisionModelWithProjection";
  const same = async () => ({ embeddings: await embed(pixelTensor(given)) });
  await row(name, reader, "image", "same", same);
  for (const kind of Object.keys(given.images)) await row(name, reader, "image", kind, () => own(kind));
  await row(name, "pipeline image-feature-extraction", "image", "own", async () => {
    const extract = await pipeline("image-feature-extraction", `${name}/model`, { dtype: "fp32" });
    return { embeddings: (await extract(await read("own"))).tolist() };
  });
  await row(name, "pipeline zero-shot-image-classification", "image", "own", async () => {
    const classify = await pipeline("zero-shot-image-classification", `${name}/model`, { dtype: "fp32" });
    await classify((await read("own"))[0], given.captions.own.slice(0, 2)); // no embeddings: that it runs is all
    return { why: "runs, but gives no embeddings" };
  });
}

for (const name of readdirSync(cases)) {
  const folder = resolve(cases, name);
  const given = JSON.parse(readFileSync(join(folder, "given.json"), "utf8"));
  await texts(name, given);
  await images(name, given, folder);
}
writeFileSync(out, JSON.stringify({ version: env.version, rows }));
