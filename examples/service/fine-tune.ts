// One fine-tune, without HTTP: texts in, events out, an AbortSignal to stop it. This is all that the service needs of lc.
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { loadDataset } from '@lc/data';
import { FastLanguageModel, SFTTrainer, type TrainerEvent } from '@lc/trainer';

export interface Job {
  texts: string[];
  maxSteps: number;
  learningRate: number;
  maxSeqLength: number;
}

/** An abort is no error: the run ends with an `end` event whose reason is 'aborted', after it has saved a checkpoint and the adapter. */
export async function fineTune(
  modelFolder: string,
  outputDir: string,
  job: Job,
  signal: AbortSignal,
  onEvent: (event: TrainerEvent) => void,
) {
  const { texts, maxSteps, learningRate, maxSeqLength } = job;
  await mkdir(outputDir, { recursive: true });
  const data = join(outputDir, 'train.jsonl');
  await writeFile(data, texts.map((text) => `${JSON.stringify({ text })}\n`).join(''));

  const { model, tokenizer } = await FastLanguageModel.fromPretrained(modelFolder, { maxSeqLength, loadIn4bit: true });
  try {
    FastLanguageModel.getPeftModel(model, { r: 16, loraAlpha: 32, targetModules: ['q_proj', 'k_proj', 'v_proj', 'o_proj'] });
    const trainDataset = await loadDataset({ paths: [data], tokenizer, maxLength: maxSeqLength, excessLengthStrategy: 'split' });
    using trainer = new SFTTrainer({ model, trainDataset, args: { outputDir, maxSteps, learningRate }, onEvent });
    await trainer.train({ signal });
  } finally {
    model.dispose(); // memory is back now, for the next run
  }
}
