import { LcError, LcTypeError, type Tensor, type Workspace } from '@lc/tensor';
import { native } from './native.js';
import { expectDevice, expectStart, isCuda } from './plan.js';
import type { RopeConfig } from './rope-config.js';

/** Frequencies of a rotary embedding; made by `ropeInit`. */
export interface RopeTable {
  /** `[rotaryDim / 2]`, radians per position, f64. */
  readonly invFreq: Float64Array;
  /** Multiplies cos and sin. */
  readonly attentionFactor: number;
  /** The first rotaryDim dims of a head are rotated, in pairs (j, j + rotaryDim / 2). */
  readonly rotaryDim: number;
}

/** What `ropeInit` takes beside the model's configuration. */
export interface RopeInitOptions {
  headDim: number;
  /** The model's max_position_embeddings. */
  maxPositionEmbeddings: number;
  /** Largest position + 1 (longest document): `dynamic` scales by it once it passes maxPositionEmbeddings. Other kinds ignore it. */
  seqLen?: number;
}

const fail = (message: string): never => {
  throw new LcError('ERR_LC_CONFIG', `rope: ${message}`);
};

function need(
  config: RopeConfig,
  key: 'factor' | 'lowFreqFactor' | 'highFreqFactor' | 'originalMaxPositionEmbeddings',
  atLeast = 0,
): number {
  const value = config[key];
  if (value === undefined || !(value > 0) || value < atLeast || !Number.isFinite(value)) {
    return fail(
      `${config.ropeType} needs ${key}, a number ${atLeast > 0 ? `of ${atLeast} or more` : 'above 0'}, got ${value}; set it in config.json`,
    );
  }
  return value;
}

/**
 * Frequencies and attention factor as `transformers` computes them (modeling_rope_utils, version 5), in f64:
 * - `default`: theta^(-2j/d). `linear` (Chen et al. 2023, position interpolation): divided by factor.
 * - `dynamic` (NTK-aware): theta * (factor * L / max - (factor - 1))^(d / (d - 2)), L = max(seqLen, maxPositionEmbeddings).
 * - `llama3`: wavelengths above original / lowFreqFactor divided by factor, those below original / highFreqFactor kept, smooth between.
 * - `yarn` (Peng et al. 2023): a ramp over the dims from kept to divided; cos and sin times attentionFactor.
 *
 * @throws LcError ERR_LC_CONFIG
 */
export function ropeInit(config: RopeConfig, options: RopeInitOptions): RopeTable {
  const { headDim, maxPositionEmbeddings: max, seqLen } = options;
  const rotaryDim = Math.trunc(headDim * (config.partialRotaryFactor ?? 1));
  if (!Number.isInteger(headDim) || !(rotaryDim >= 2) || rotaryDim % 2 !== 0 || rotaryDim > headDim || rotaryDim > 1024) {
    return fail(
      `headDim ${headDim} with partialRotaryFactor ${config.partialRotaryFactor ?? 1} rotates ${rotaryDim} dims; expected an even number from 2 to headDim, at most 1024`,
    );
  }
  if (!(max > 0)) return fail(`maxPositionEmbeddings must be positive, got ${max}`);
  if (seqLen !== undefined && !(seqLen >= 0)) return fail(`seqLen must be a number of tokens, got ${seqLen}`);
  let theta = config.ropeTheta;
  if (!(theta > 1) || !Number.isFinite(theta)) return fail(`ropeTheta must be above 1, got ${theta}; correct rope_theta in config.json`);

  if (config.ropeType === 'dynamic') {
    const factor = need(config, 'factor', 1);
    const length = Math.max(seqLen ?? max, max);
    if (length > max) {
      if (rotaryDim === 2) return fail('dynamic scaling is undefined for 2 rotated dims (d / (d - 2)); expected 4 or more');
      theta *= ((factor * length) / max - (factor - 1)) ** (rotaryDim / (rotaryDim - 2));
    }
  }
  const invFreq = Float64Array.from({ length: rotaryDim / 2 }, (_, j) => theta ** ((-2 * j) / rotaryDim));
  let attentionFactor = 1;
  switch (config.ropeType) {
    case 'default':
    case 'dynamic':
      break;
    case 'linear': {
      const factor = need(config, 'factor', 1);
      for (let j = 0; j < invFreq.length; j++) invFreq[j] = (invFreq[j] as number) / factor;
      break;
    }
    case 'llama3':
      llama3(config, invFreq);
      break;
    case 'yarn':
      attentionFactor = yarn(config, invFreq, max);
      break;
    default:
      return fail(`unknown ropeType ${JSON.stringify(config.ropeType)}; supported: default, linear, dynamic, yarn, llama3`);
  }
  return { invFreq, attentionFactor, rotaryDim };
}

function llama3(config: RopeConfig, invFreq: Float64Array): void {
  const factor = need(config, 'factor', 1);
  const low = need(config, 'lowFreqFactor');
  const high = need(config, 'highFreqFactor');
  const original = need(config, 'originalMaxPositionEmbeddings');
  if (high <= low) fail(`llama3 needs highFreqFactor above lowFreqFactor, got ${high} and ${low}`);
  for (let j = 0; j < invFreq.length; j++) {
    const f = invFreq[j] as number;
    const turns = (original * f) / (2 * Math.PI); // over the original length
    const smooth = Math.min(1, Math.max(0, (turns - low) / (high - low)));
    invFreq[j] = (1 - smooth) * (f / factor) + smooth * f;
  }
}

const magnitude = (scale: number, mscale = 1): number => (scale <= 1 ? 1 : 0.1 * mscale * Math.log(scale) + 1);

/** The ramp's bounds as dims, before they are clamped to the head: `low` turns betaFast times over the original length, `high` betaSlow times. */
export function yarnRange(config: RopeConfig, rotaryDim: number, original: number): { low: number; high: number } {
  const dimOf = (turns: number): number => (rotaryDim * Math.log(original / (turns * 2 * Math.PI))) / (2 * Math.log(config.ropeTheta));
  const low = dimOf(config.betaFast || 32);
  const high = dimOf(config.betaSlow || 1);
  return config.truncate === false ? { low, high } : { low: Math.floor(low), high: Math.ceil(high) };
}

function yarn(config: RopeConfig, invFreq: Float64Array, max: number): number {
  const original = config.originalMaxPositionEmbeddings === undefined ? max : need(config, 'originalMaxPositionEmbeddings');
  const factor = config.factor === undefined ? max / original : need(config, 'factor', 1);
  const rotaryDim = invFreq.length * 2;
  const range = yarnRange(config, rotaryDim, original);
  const low = Math.max(range.low, 0);
  let high = Math.min(range.high, rotaryDim - 1);
  if (high === low) high += 0.001;
  for (let j = 0; j < invFreq.length; j++) {
    const f = invFreq[j] as number;
    const ramp = Math.min(1, Math.max(0, (j - low) / (high - low)));
    invFreq[j] = ramp * (f / factor) + (1 - ramp) * f;
  }
  if (config.attentionFactor !== undefined) {
    if (!(config.attentionFactor > 0)) return fail(`attentionFactor must be above 0, got ${config.attentionFactor}`);
    return config.attentionFactor;
  }
  if (config.mscale && config.mscaleAllDim) return magnitude(factor, config.mscale) / magnitude(factor, config.mscaleAllDim);
  return magnitude(factor);
}

/** Arguments of `ropeForward` and `ropeBackward`: x [n, heads, headDim] is rotated in place. */
export interface RopeArgs {
  /** f32 (on a GPU also bf16) [n, heads, headDim], in place; rows may be strided. */
  x: Tensor;
  /** Index of the first token in the packed sequence. */
  start: number;
  /** i32 [n] or null (one document from 0): position = start + i - docStart[i]. On x's device. */
  docStart?: Tensor | null;
  rope: RopeTable;
  /** Carries the stream on CUDA; the CPU takes nothing from it. */
  ws?: Workspace;
}

function apply(op: string, args: RopeArgs, transpose: boolean): void {
  const { x, start, rope } = args;
  const [tokens, , headDim] = x.shape as [number, number, number];
  const cuda = isCuda(x);
  if (x.dtype !== 'f32' && !(cuda && x.dtype === 'bf16'))
    throw new LcTypeError('ERR_LC_DTYPE', `${op}: x must be f32 on the CPU, bf16 or f32 on a GPU, got ${x}`);
  if (x.shape.length !== 3 || rope.rotaryDim > headDim) {
    throw new LcTypeError(
      'ERR_LC_SHAPE',
      `${op}: x must be [tokens, heads, headDim], headDim ${rope.rotaryDim} or more, got ${x}; make the table with x's headDim`,
    );
  }
  if (!Number.isFinite(rope.attentionFactor))
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: rope.attentionFactor must be finite, got ${rope.attentionFactor}`);
  expectStart(op, start, tokens);
  expectDevice(op, 'docStart', args.docStart, x);
  if (tokens === 0) return;
  native().rope({
    x,
    start,
    docStart: args.docStart ?? null,
    invFreq: rope.invFreq,
    factor: rope.attentionFactor,
    transpose,
    ...(args.ws ? { stream: args.ws.stream } : {}),
  });
}

/**
 * Rotates each head of q or k by its position, in place (RoFormer, Su et al. 2021; rotate-half as in Hugging Face): with c, s = cos and sin of
 * position * invFreq[j] times attentionFactor, (a, b) at dims (j, j + rotaryDim / 2) becomes (a c - b s, b c + a s). Angles are f64 and reduced
 * exactly, so that positions far beyond 2^19 cost no precision.
 * @throws LcTypeError ERR_LC_SHAPE, ERR_LC_DTYPE, ERR_LC_STRIDES, ERR_LC_ARGUMENT
 */
export function ropeForward(args: RopeArgs): void {
  apply('ropeForward', args, false);
}

/** d(loss)/d(rotated) -> d(loss)/d(unrotated), in place: the transposed rotation (attentionFactor included). @throws as ropeForward */
export function ropeBackward(args: RopeArgs): void {
  apply('ropeBackward', args, true);
}
