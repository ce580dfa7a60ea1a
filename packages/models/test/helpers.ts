import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type DType, type TypedArray, Workspace } from '@lc/tensor';
import { openSafetensorsFolder, type SafetensorsEntry, writeSafetensors } from '@lc/tensor/safetensors';
import { afterAll } from 'vitest';
import { type CausalLM, TrainingSession } from '../src/index.js';

export const fixtures = fileURLToPath(new URL('../../../test/fixtures/reference-models/', import.meta.url));

const made: string[] = [];
afterAll(() => {
  for (const folder of made) rmSync(folder, { recursive: true, force: true });
});

export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'lc-models-'));
  made.push(folder);
  return folder;
}

export type Weights = Map<string, { shape: readonly number[]; dtype: DType; data: TypedArray }>;

export async function readWeights(folder: string): Promise<Weights> {
  using reader = await openSafetensorsFolder(folder);
  const out: Weights = new Map();
  for (const name of reader.names) {
    const { shape, dtype } = reader.info(name);
    out.set(name, { shape, dtype, data: await reader.read(name) });
  }
  return out;
}

export const entries = (weights: Weights): SafetensorsEntry[] => [...weights].map(([name, weight]) => ({ name, ...weight }));

/** A copy of a fixture with other weights, and other fields in config.json. */
export async function variant(
  name: string,
  change: (weights: Weights) => void | Promise<void>,
  config: Record<string, unknown> = {},
): Promise<string> {
  const folder = temporaryFolder();
  const weights = await readWeights(fixtures + name);
  await change(weights);
  await writeSafetensors(join(folder, 'model.safetensors'), entries(weights));
  const json = JSON.parse(readFileSync(join(fixtures, name, 'config.json'), 'utf8')) as Record<string, unknown>;
  writeFileSync(join(folder, 'config.json'), JSON.stringify({ ...json, ...config }));
  return folder;
}

export function copyOf(name: string): string {
  const folder = temporaryFolder();
  cpSync(fixtures + name, folder, { recursive: true });
  return folder;
}

/** Logits [tokens, vocab] of one document. */
export async function logitsOf(model: CausalLM, ids: readonly number[], chunk = ids.length): Promise<Float32Array> {
  using ws = new Workspace();
  using session = new TrainingSession({ model, tokens: ids.length, chunk, ws, evaluateOnly: true });
  const { vocabSize } = model.config;
  const out = new Float32Array(ids.length * vocabSize);
  await session.evaluate(
    { inputIds: Int32Array.from(ids), labels: Int32Array.from(ids) },
    {
      onHidden: (hidden, at) =>
        ws.scoped(() => {
          const logits = ws.alloc([at.length, vocabSize]);
          model.logits(hidden, logits, ws);
          out.set(logits.data(), at.start * vocabSize);
        }),
    },
  );
  return out;
}

export const someIds = (count: number, vocab = 512): number[] => Array.from({ length: count }, (_, i) => (i * 7919 + 13) % vocab);
