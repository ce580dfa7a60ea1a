/** The quickstart's fine-tune on the GPU: `./run train MODEL_FOLDER TEXT_FOLDER [steps]`. Every sixteenth file is held out. */
import { mkdtempSync, readdirSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { loadDataset } from '@lc/data';
import { FastLanguageModel, ProgressDisplay, SFTTrainer } from '@lc/trainer';

export async function gpuTrain(folder: string, texts: string, steps: number): Promise<void> {
  const number = (name: string): number => Number(/(\d+)/.exec(name)?.[1] ?? 0);
  const files = readdirSync(texts)
    .filter((name) => /^chapter_\d+\.txt$/.test(name))
    .sort((a, b) => number(a) - number(b))
    .map((name) => join(texts, name));
  const { model, tokenizer } = await FastLanguageModel.fromPretrained(folder, {
    maxSeqLength: 4096,
    loadIn4bit: true,
    device: 'cuda',
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
  const load = (paths: string[], shuffle: boolean) =>
    loadDataset({ paths, tokenizer, maxLength: 4096, excessLengthStrategy: 'split', shuffle, seed: 3407 });
  const trainDataset = await load(
    files.filter((_, i) => i % 16 !== 15),
    true,
  );
  const evalDataset = await load(
    files.filter((_, i) => i % 16 === 15),
    false,
  );
  const display = new ProgressDisplay();
  const trainer = new SFTTrainer({
    model,
    trainDataset,
    args: {
      outputDir: mkdtempSync(join(tmpdir(), 'lc-')),
      maxSteps: steps,
      learningRate: 5e-3,
      lrSchedulerType: 'cosine',
      warmupSteps: 3,
      weightDecay: 0,
      chunk: 1024,
      lossChunk: 512,
      checkpointDeviceBytes: 2 * 4096 * 192 * 2,
      seed: 3407,
    },
    onEvent: (event) => event.type !== 'progress' && display.handle(event),
  });
  const before = await trainer.evaluate(evalDataset);
  await trainer.train();
  const after = await trainer.evaluate(evalDataset);
  console.log(`held-out loss on cuda: ${before.loss.toFixed(2)} -> ${after.loss.toFixed(2)}`);
  trainer.dispose();
  model.dispose();
}
