/** What one run of `lc bench step` is to do, and how that becomes sizes of a plan. */
import type { CausalLM } from '@lc/models';
import { dtypeBytes, LcError } from '@lc/tensor';

export const optimizations = ['chunked-ce', 'offload', 'tiled-mlp', 'chunks'] as const;
export type Optimization = (typeof optimizations)[number];

export interface StepCase {
  tokens: number;
  /** Optimizations to do without. */
  without: readonly Optimization[];
  /** Fix a size instead of leaving it to the plan. */
  chunk?: number | undefined;
  tile?: number | undefined;
  lossChunk?: number | undefined;
  /** A checkpoint every so many layers. */
  layersPerSegment?: number | 'auto' | undefined;
  /** Every gradient checkpoint in host memory, instead of in spare device memory first. */
  host?: boolean | undefined;
  /** Layers without a window whose attention output is kept for backward, of each the last so many tokens. Default: as much as fits. */
  keep?: number | 'auto' | { layers: number; tokens: number } | undefined;
  /** Attention's backward in no fixed order of additions. */
  nondeterministic?: boolean | undefined;
  /** Bytes of device memory, and of host memory, that may be taken. */
  vram?: number | undefined;
  ram?: number | undefined;
  /** Time phases and waits for copies. */
  profile?: boolean | undefined;
  /** After the timed step another one, of which every op is timed. */
  profileOps?: boolean | undefined;
  /** Execute two layers in the memory of all. */
  probe?: boolean | undefined;
}

export interface StepSizes {
  chunk: number | undefined;
  tile: number | undefined;
  lossChunk: number | undefined;
  checkpointDeviceBytes: number | undefined;
  /** Taken beside the plan: logits and their gradient, f32 [tokens, vocab] each, less what the plan counts for one chunk's. */
  wholeLogitsBytes: number;
}

/** @throws ERR_LC_CONFIG for a name that is none */
export function parseWithout(text: string | undefined): Optimization[] {
  const names = (text ?? '')
    .split(',')
    .map((name) => name.trim())
    .filter((name) => name !== '' && name !== 'none');
  for (const name of names) {
    if (!(optimizations as readonly string[]).includes(name))
      throw new LcError('ERR_LC_CONFIG', `--without: '${name}' is none of ${optimizations.join(', ')}`);
  }
  return names as Optimization[];
}

/**
 * Without 'chunks' the whole sequence is one chunk; without 'tiled-mlp' a chunk is one tile; without 'offload' every checkpoint stays on the device; without
 * 'chunked-ce' f32 logits of the whole sequence exist at once, and as much again for their gradient, as in plain PyTorch.
 */
export function sizesOf(model: CausalLM, c: StepCase): StepSizes {
  const { hiddenSize, vocabSize, layers } = model.config;
  const lacks = (name: Optimization): boolean => c.without.includes(name);
  const wholeLogits = lacks('chunked-ce');
  const chunk = lacks('chunks') ? c.tokens : (c.chunk ?? (wholeLogits ? 8192 : undefined));
  const rows = Math.min(chunk ?? c.tokens, c.tokens);
  const act = dtypeBytes[model.device.startsWith('cuda') ? 'bf16' : 'f32'];
  return {
    chunk: chunk === undefined ? undefined : rows,
    tile: lacks('tiled-mlp') ? rows : c.tile,
    lossChunk: wholeLogits ? rows : c.lossChunk,
    checkpointDeviceBytes: lacks('offload') ? layers.length * c.tokens * hiddenSize * act : c.host ? 0 : undefined,
    wholeLogitsBytes: wholeLogits ? 4 * vocabSize * (2 * c.tokens - rows) : 0,
  };
}

export const nameOf = (c: StepCase): string => (c.without.length === 0 ? 'all' : `without ${c.without.join(', ')}`);
