/** Checkpoint folders: what is needed to go on exactly where a run stopped. */
import { existsSync, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { LcError } from '@lc/tensor';
import { z } from 'zod';
import { isComplete, readJson } from './files.js';

const schema = z.object({
  schema: z.literal(1),
  /** Optimizer steps done. */
  globalStep: z.number().int().nonnegative(),
  totalSteps: z.number().int().positive(),
  /** Fingerprint of the options that must not change across a resume. */
  fingerprint: z.string(),
  optimizerStep: z.number().int().nonnegative(),
  /** State of the training data's iterator; the dataset's own format. */
  data: z.unknown(),
  lossHistory: z.array(z.number()),
});

export type TrainerState = z.infer<typeof schema>;

/** `checkpoint-N` folders of a run that were written to their end, oldest first. */
export function completeCheckpoints(outputDir: string): { step: number; path: string }[] {
  if (!existsSync(outputDir)) return [];
  return readdirSync(outputDir)
    .map((name) => ({ match: /^checkpoint-(\d{1,9})$/.exec(name), path: join(outputDir, name) }))
    .filter((entry) => entry.match && isComplete(entry.path))
    .map((entry) => ({ step: Number(entry.match?.[1]), path: entry.path }))
    .sort((a, b) => a.step - b.step);
}

/** Deletes all but the newest `limit` complete checkpoints. */
export function pruneCheckpoints(outputDir: string, limit: number): void {
  for (const old of completeCheckpoints(outputDir).slice(0, -limit)) rmSync(old.path, { recursive: true, force: true });
}

/** @throws ERR_LC_IO, ERR_LC_DATA when the folder is incomplete, of another run, or not a checkpoint. */
export function readState(folder: string, fingerprint: string): TrainerState {
  if (!isComplete(folder)) {
    throw new LcError(
      'ERR_LC_DATA',
      `resume: ${folder} is not a complete checkpoint (no COMPLETE marker); choose an earlier checkpoint-N folder`,
    );
  }
  const parsed = schema.safeParse(readJson(join(folder, 'trainer_state.json')));
  if (!parsed.success)
    throw new LcError('ERR_LC_DATA', `resume: ${join(folder, 'trainer_state.json')} is not a trainer state: ${parsed.error.message}`);
  if (parsed.data.fingerprint !== fingerprint) {
    throw new LcError(
      'ERR_LC_CONFIG',
      `resume: ${folder} was made with other options (model, adapter, data order, optimizer, schedule or seed); resume with the same ones, or start a new run`,
    );
  }
  return parsed.data;
}
