import { LcTypeError } from '@lc/tensor';

/** How `sampleToken` chooses. */
export interface SampleOptions {
  /** 0 (default): the most likely token. */
  temperature?: number;
  /** Sample among the fewest tokens whose probabilities sum to at least this; default 1. */
  topP?: number;
  /** Sample among this many most likely tokens; default 0: all. */
  topK?: number;
  /** Seed of the draws; same seed, same text. Default 0. */
  seed?: number;
}

/** @throws ERR_LC_ARGUMENT */
export function checkSampleOptions(options: SampleOptions): void {
  const { temperature = 0, topP = 1, topK = 0, seed = 0 } = options;
  const problems: string[] = [];
  if (!Number.isFinite(temperature) || temperature < 0) problems.push(`temperature must be a number >= 0, got ${temperature}`);
  if (!(topP > 0 && topP <= 1)) problems.push(`topP must be above 0 and at most 1, got ${topP}`);
  if (!Number.isInteger(topK) || topK < 0) problems.push(`topK must be a whole number >= 0, got ${topK}`);
  if (!Number.isSafeInteger(seed)) problems.push(`seed must be a whole number, got ${seed}`);
  if (problems.length > 0) throw new LcTypeError('ERR_LC_ARGUMENT', `generate: ${problems.join('; ')}`);
}

/** One uniform number in [0, 1) per (seed, index): a hash, so that a draw depends on nothing drawn before. */
export function uniform(seed: number, index: number): number {
  let h = Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) ^ Math.imul(index + 0x6d2b79f5, 0xc2b2ae35);
  for (const factor of [0x7feb352d, 0x846ca68b]) {
    h = Math.imul(h ^ (h >>> 16), factor);
  }
  return ((h ^ (h >>> 15)) >>> 0) / 4294967296;
}

/** Draws a token id from logits [vocab]. `index` counts the draws of a text. @throws ERR_LC_NAN when no logit is finite */
export function sampleToken(logits: ArrayLike<number>, options: SampleOptions, index: number): number {
  const { temperature = 0, topP = 1, topK = 0, seed = 0 } = options;
  let best = -1;
  for (let i = 0; i < logits.length; i++) {
    const value = logits[i] as number;
    if (Number.isNaN(value))
      throw new LcTypeError(
        'ERR_LC_NAN',
        `generate: the logit of token ${i} is not a number; the weights or the adapter hold NaN or infinite values`,
      );
    if (best < 0 || value > (logits[best] as number)) best = i;
  }
  if (temperature === 0) return best;
  // Most likely first; ties by id, so that the order is the same everywhere.
  let order = Array.from({ length: logits.length }, (_, i) => i).sort((a, b) => (logits[b] as number) - (logits[a] as number) || a - b);
  if (topK > 0) order = order.slice(0, topK);
  const largest = logits[best] as number;
  const weights = order.map((id) => Math.exp(((logits[id] as number) - largest) / temperature));
  const total = weights.reduce((a, b) => a + b, 0);
  let kept = 0;
  let mass = 0;
  while (kept < weights.length && mass < topP * total) mass += weights[kept++] as number;
  let left = uniform(seed, index) * mass;
  for (let i = 0; i < kept; i++) {
    left -= weights[i] as number;
    if (left < 0) return order[i] as number;
  }
  return order[kept - 1] as number;
}
