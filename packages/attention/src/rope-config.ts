import { LcError } from '@lc/tensor';

/** Kinds of RoPE scaling that are computed; others are refused. */
export type RopeType = 'default' | 'linear' | 'dynamic' | 'yarn' | 'llama3';

/** Rotary position embedding of a model, whichever way its config.json spells it. */
export interface RopeConfig {
  ropeType: RopeType;
  /** Base of the frequencies. */
  ropeTheta: number;
  /** Share of the head dim that is rotated (the first dims). Default 1. */
  partialRotaryFactor?: number;
  /** How many times longer than in pretraining (linear, dynamic, llama3, yarn; yarn may leave it out). */
  factor?: number;
  /** Default: the model's maxPositionEmbeddings (yarn; llama3 must name it). */
  originalMaxPositionEmbeddings?: number;
  /** llama3. */
  lowFreqFactor?: number;
  /** llama3. */
  highFreqFactor?: number;
  /** yarn: dims that turn more often than this over the original length keep their frequency. Default 32. */
  betaFast?: number;
  /** yarn: dims that turn less often than this are divided by factor. Default 1. */
  betaSlow?: number;
  /** yarn: multiplies cos and sin; default from factor, or from mscale and mscaleAllDim. */
  attentionFactor?: number;
  mscale?: number;
  mscaleAllDim?: number;
  /** yarn: round the bounds of the ramp to whole dims. Default true; gpt-oss: false. */
  truncate?: boolean;
}

type Json = Record<string, unknown>;

const known: readonly RopeType[] = ['default', 'linear', 'dynamic', 'yarn', 'llama3'];
const isObject = (x: unknown): x is Json => typeof x === 'object' && x !== null && !Array.isArray(x);
const fail = (message: string): never => {
  throw new LcError('ERR_LC_CONFIG', `rope: ${message}`);
};

function number(from: Json, key: string): number | undefined {
  const value = from[key];
  if (value === undefined || value === null) return undefined;
  if (typeof value !== 'number' || !Number.isFinite(value))
    return fail(`${key} must be a number, got ${JSON.stringify(value)}; correct config.json`);
  return value;
}

/**
 * Reads the rotary embedding from a Hugging Face config.json object: `rope_parameters` (transformers 5), or `rope_scaling` with a top-level
 * `rope_theta`; `rope_type` or `type`; `partial_rotary_factor` in either place. `rope_parameters` per layer type (`{ full_attention: {...} }`) need
 * `layerType`. Keys that a kind does not use are ignored.
 *
 * @throws LcError ERR_LC_CONFIG: an unknown kind, or a value that is not a number
 */
export function parseRopeConfig(config: Record<string, unknown>, options: { layerType?: string } = {}): RopeConfig {
  const section = config.rope_parameters != null ? 'rope_parameters' : 'rope_scaling';
  const found: unknown = config[section] ?? {};
  if (!isObject(found)) return fail(`${section} must be an object or null, got ${JSON.stringify(found)}; correct config.json`);
  let from: Json = found;
  const nested = Object.keys(from).filter((key) => isObject(from[key]));
  if (nested.length > 0) {
    const chosen = options.layerType === undefined ? undefined : from[options.layerType];
    if (!isObject(chosen))
      return fail(`${section} differs by layer type (${nested.join(', ')}); pass one of them as layerType, got ${options.layerType}`);
    from = chosen;
  }
  const kind = from.rope_type ?? from.type ?? 'default';
  if (!known.includes(kind as RopeType)) {
    return fail(
      `unknown rope_type ${JSON.stringify(kind)} in ${section}; supported: ${known.join(', ')}. A model trained with another kind would compute nonsense`,
    );
  }
  if (from.alpha != null && kind === 'dynamic') return fail(`dynamic scaling with alpha (Hunyuan) is not supported; supported: factor`);
  const truncate = from.truncate;
  if (truncate != null && typeof truncate !== 'boolean')
    return fail(`truncate must be true or false, got ${JSON.stringify(truncate)}; correct config.json`);
  return {
    ropeType: kind as RopeType,
    ropeTheta: number(from, 'rope_theta') ?? number(config, 'rope_theta') ?? 10000,
    partialRotaryFactor: number(from, 'partial_rotary_factor') ?? number(config, 'partial_rotary_factor'),
    factor: number(from, 'factor'),
    originalMaxPositionEmbeddings: number(from, 'original_max_position_embeddings') ?? number(config, 'original_max_position_embeddings'),
    lowFreqFactor: number(from, 'low_freq_factor'),
    highFreqFactor: number(from, 'high_freq_factor'),
    betaFast: number(from, 'beta_fast'),
    betaSlow: number(from, 'beta_slow'),
    attentionFactor: number(from, 'attention_factor'),
    mscale: number(from, 'mscale'),
    mscaleAllDim: number(from, 'mscale_all_dim'),
    truncate: truncate ?? undefined,
  };
}
