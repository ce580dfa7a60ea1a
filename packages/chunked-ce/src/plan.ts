import { LcTypeError, memInfo, type Tensor } from '@lc/tensor';

/** Rows of logits alive at once: a number of rows, a budget for them in bytes, or from the memory that is free now. */
export type ChunkSize = number | { bytes: number } | 'auto';

/** 'auto' takes at most this share of what is free, and at most this many bytes: a larger chunk gains no speed. */
const AUTO_SHARE = 0.25;
const AUTO_LIMIT = 1 << 30;

/** Bytes per row of a chunk: its logits, its hidden row gathered and its gradient (f32). */
export function bytesPerRow(vocab: number, hidden: number): number {
  return 4 * (vocab + 2 * hidden) + 12;
}

/**
 * Rows per chunk, at least 1 and at most `rows`. 'auto' asks the device at every call.
 * @throws ERR_LC_ARGUMENT
 */
export function chunkRows(chunk: ChunkSize, rows: number, vocab: number, hidden: number, device: Tensor['device']): number {
  if (typeof chunk === 'number') {
    if (!Number.isSafeInteger(chunk) || chunk < 1)
      throw new LcTypeError('ERR_LC_ARGUMENT', `chunkedCrossEntropy: chunk must be a whole number of rows >= 1, got ${chunk}`);
    return Math.max(1, Math.min(rows, chunk));
  }
  let bytes: number;
  if (chunk === 'auto') bytes = Math.min(AUTO_LIMIT, memInfo(device).freeBytes * AUTO_SHARE);
  else {
    bytes = chunk?.bytes;
    if (!(bytes > 0))
      throw new LcTypeError(
        'ERR_LC_ARGUMENT',
        `chunkedCrossEntropy: chunk must be rows, { bytes } or 'auto', got ${JSON.stringify(chunk)}`,
      );
  }
  return Math.max(1, Math.min(rows, Math.floor(bytes / bytesPerRow(vocab, hidden))));
}

/** What the loss is, beside logits and labels. */
export interface CrossEntropyOptions {
  /** Labels with this value are not learnt. Default -100. */
  ignoreIndex?: number;
  /** As torch.nn.CrossEntropyLoss: share of the target spread over the vocabulary. Default 0. */
  labelSmoothing?: number;
  /** Adds zLoss * lse^2 per token (PaLM, Chowdhery et al. 2022). Default 0. */
  zLoss?: number;
  /** Logits become softCap * tanh(logits / softCap) (Gemma 2). Default 0: off. */
  softCap?: number;
  /** Logits are multiplied by this before capping. Default 1. */
  logitScale?: number;
}

/** @throws ERR_LC_ARGUMENT naming the option that is out of range */
export function checkOptions(o: Required<CrossEntropyOptions>): void {
  const fail = (name: string, want: string, got: unknown): never => {
    throw new LcTypeError('ERR_LC_ARGUMENT', `chunkedCrossEntropy: ${name} must be ${want}, got ${String(got)}`);
  };
  if (!Number.isInteger(o.ignoreIndex)) fail('ignoreIndex', 'a whole number', o.ignoreIndex);
  if (!(o.labelSmoothing >= 0 && o.labelSmoothing <= 1)) fail('labelSmoothing', 'in [0, 1]', o.labelSmoothing);
  if (!(o.zLoss >= 0 && Number.isFinite(o.zLoss))) fail('zLoss', 'a finite number >= 0', o.zLoss);
  if (!(o.softCap >= 0 && Number.isFinite(o.softCap))) fail('softCap', 'a finite number >= 0', o.softCap);
  if (!Number.isFinite(o.logitScale) || o.logitScale === 0) fail('logitScale', 'a finite number other than 0', o.logitScale);
}

/**
 * Labels aligned with hidden rows: position i gets the label of token i + 1 of the same document. The last token of every document gets `ignoreIndex`.
 *
 * @param labels unshifted, as Hugging Face has them; [tokens]
 * @param docStart [tokens]: index of the first token of each token's document; null: one document
 */
export function shiftLabels(labels: ArrayLike<number>, docStart: ArrayLike<number> | null = null, ignoreIndex = -100): Int32Array {
  const n = labels.length;
  const out = new Int32Array(n).fill(ignoreIndex);
  for (let i = 0; i + 1 < n; i++) if (!docStart || docStart[i] === docStart[i + 1]) out[i] = labels[i + 1] as number;
  return out;
}
