/** What a step must compute: the model fixes it, not the run. From it, the time below which an H100 could hardly go. */
import type { ModelConfig } from '@lc/models';

/** Attained rates of an H100 in FLOP/s that the floor divides by: bf16 GEMM of cuBLASLt, attention of cuDNN at head dim 64 (forward and backward). */
export const floorRates = { gemm: 750e12, attention: 450e12 } as const;

export interface StepFlops {
  /** One forward of every layer's linears (active experts and router included), per token. */
  linear: number;
  /** Forward of the LM head and the gradient of its input, per token. */
  head: number;
  /** One forward of every layer's attention over visible pairs, for the whole sequence of one document. */
  attention: number;
  /** 3 x linear (forward, recomputation, gradient of the inputs) + head + 4.5 x attention (forward, recomputation, 2.5 in backward; 3.5 for queries whose output is kept). */
  step: number;
  /** Seconds at `floorRates`. */
  floorSeconds: number;
}

/** Pairs of a query and a key that it sees: all earlier keys, or the last `window`, itself included. */
export function visiblePairs(tokens: number, window: number | null): number {
  const w = Math.min(window ?? tokens, tokens);
  return (w * (w + 1)) / 2 + (tokens - w) * w;
}

/**
 * @param options.layers count only the first so many (a probe)
 * @param options.kept of the last `layers` layers without a window the attention output of the last `tokens` tokens is kept, so that backward does not run attention forward again for them
 */
export function stepFlops(
  config: ModelConfig,
  tokens: number,
  options: { layers?: number; kept?: { layers: number; tokens: number } } = {},
): StepFlops {
  const { hiddenSize: h, headDim, vocabSize, moe } = config;
  const { layers = config.layers.length, kept = { layers: 0, tokens: 0 } } = options;
  const q = config.numAttentionHeads * headDim;
  const kv = config.numKeyValueHeads * headDim;
  const keeps = new Set(
    config.layers.flatMap(({ window }, i) => (window === null ? [i] : [])).slice(kept.layers > 0 ? -kept.layers : config.layers.length),
  );
  const notKept = visiblePairs(tokens - kept.tokens, null) / visiblePairs(tokens, null); // of a layer that keeps: share of the pairs
  let linear = 0;
  let attention = 0;
  let attentionWork = 0;
  for (const [i, { window, mlp }] of config.layers.slice(0, layers).entries()) {
    const dense = 3 * h * config.intermediateSize;
    const active = moe ? h * moe.numExperts + moe.numExpertsPerTok * 3 * h * moe.intermediateSize : 0;
    const forward = 4 * q * visiblePairs(tokens, window);
    linear += 2 * (h * (q + 2 * kv) + q * h + (mlp === 'moe' ? active : dense));
    attention += forward;
    attentionWork += (3.5 + (keeps.has(i) ? notKept : 1)) * forward;
  }
  const head = 4 * h * vocabSize;
  const gemms = (3 * linear + head) * tokens;
  return {
    linear,
    head,
    attention,
    step: gemms + attentionWork,
    floorSeconds: gemms / floorRates.gemm + attentionWork / floorRates.attention,
  };
}
