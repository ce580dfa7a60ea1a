import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { TokenSequence } from '@lc/models';
import { openSafetensors, type SafetensorsFile } from '@lc/tensor/safetensors';

/** Folders made as test/fixtures/reference-models/README.md says: a model, an adapter, and what transformers and PEFT compute from them. */
export const referenceFolder =
  process.env.LCTX_REFERENCE_MODELS ?? fileURLToPath(new URL('../fixtures/reference-models/', import.meta.url));

export const referenceModels: readonly string[] = readdirSync(referenceFolder)
  .filter(
    (name) => existsSync(join(referenceFolder, name, 'config.json')) && existsSync(join(referenceFolder, name, 'reference.safetensors')),
  )
  .sort();

export interface Reference {
  readonly folder: string;
  readonly rows: number;
  readonly length: number;
  /** The batch as one packed sequence: each row is a document. */
  readonly sequence: TokenSequence;
  readonly loss: number;
  /** [rows, length, vocabulary]; empty where the file has none. */
  readonly logits: Float32Array;
  readonly adapterLoss: number;
  /** Likewise. */
  readonly adapterLogits: Float32Array;
  /** [steps][loss, gradient norm] */
  readonly curve: readonly (readonly [number, number])[];
  /** By parameter, as lc names it. */
  readonly gradients: ReadonlyMap<string, Float32Array>;
  readonly after: ReadonlyMap<string, Float32Array>;
}

export async function readReference(name: string): Promise<Reference> {
  const folder = join(referenceFolder, name);
  using file = await openSafetensors(join(folder, 'reference.safetensors'));
  const [rows, length] = file.info('input_ids').shape as [number, number];
  const f32 = (key: string): Promise<Float32Array> => file.read<Float32Array>(key);
  const optional = (key: string): Promise<Float32Array> | Float32Array => (file.names.includes(key) ? f32(key) : new Float32Array());
  const pairs = await f32('adamw_curve_loss_gradnorm');
  return {
    folder,
    rows,
    length,
    sequence: {
      inputIds: await file.read<Int32Array>('input_ids'),
      labels: await file.read<Int32Array>('labels'),
      docStart: Int32Array.from({ length: rows * length }, (_, i) => i - (i % length)),
    },
    loss: (await f32('loss'))[0] as number,
    logits: await optional('logits'),
    adapterLoss: (await f32('adapter_loss'))[0] as number,
    adapterLogits: await optional('adapter_logits'),
    curve: Array.from({ length: pairs.length / 2 }, (_, i) => [pairs[2 * i] as number, pairs[2 * i + 1] as number] as const),
    gradients: await group(file, 'grad.'),
    after: await group(file, `after${pairs.length / 2}.`),
  };
}

async function group(file: SafetensorsFile, prefix: string): Promise<Map<string, Float32Array>> {
  const out = new Map<string, Float32Array>();
  for (const name of file.names) {
    // PEFT's in-memory names carry the adapter's name, its files do not.
    if (name.startsWith(prefix))
      out.set(name.slice(prefix.length).replace(/\.default\.weight$/, '.weight'), await file.read<Float32Array>(name));
  }
  return out;
}
