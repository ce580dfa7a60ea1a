/** The parts of config.json where the architectures differ. Each appends what is wrong to the reader's problems. */
import { parseRopeConfig, type RopeConfig, ropeInit } from '@lc/attention';
import type { Architecture, LayerConfig, MoeConfig, ParseConfigOptions } from './config.js';
import type { FieldReader } from './json.js';

export interface Family {
  readonly modelType: string;
  readonly ropeTheta: number;
  readonly rmsNormEps: number;
  readonly maxPositionEmbeddings: number;
  readonly headDim: number | null;
  readonly numKeyValueHeads: number | null;
}

/** Defaults of the configuration classes of transformers, for fields that config.json leaves out. */
export const families: Record<Architecture, Family> = {
  GptOssForCausalLM: {
    modelType: 'gpt_oss',
    ropeTheta: 150000,
    rmsNormEps: 1e-5,
    maxPositionEmbeddings: 131072,
    headDim: 64,
    numKeyValueHeads: 8,
  },
  LlamaForCausalLM: {
    modelType: 'llama',
    ropeTheta: 10000,
    rmsNormEps: 1e-6,
    maxPositionEmbeddings: 2048,
    headDim: null,
    numKeyValueHeads: null,
  },
  MistralForCausalLM: {
    modelType: 'mistral',
    ropeTheta: 10000,
    rmsNormEps: 1e-6,
    maxPositionEmbeddings: 131072,
    headDim: null,
    numKeyValueHeads: 8,
  },
  Qwen2ForCausalLM: {
    modelType: 'qwen2',
    ropeTheta: 10000,
    rmsNormEps: 1e-6,
    maxPositionEmbeddings: 32768,
    headDim: null,
    numKeyValueHeads: 32,
  },
  Qwen3ForCausalLM: {
    modelType: 'qwen3',
    ropeTheta: 10000,
    rmsNormEps: 1e-6,
    maxPositionEmbeddings: 32768,
    headDim: 128,
    numKeyValueHeads: 32,
  },
  Qwen3MoeForCausalLM: {
    modelType: 'qwen3_moe',
    ropeTheta: 10000,
    rmsNormEps: 1e-6,
    maxPositionEmbeddings: 32768,
    headDim: null,
    numKeyValueHeads: 4,
  },
};

export function ropeOf(
  f: FieldReader,
  given: { family: Family; headDim: number; maxPositionEmbeddings: number; ropeScaling: ParseConfigOptions['ropeScaling'] },
): RopeConfig {
  const { family, headDim, maxPositionEmbeddings, ropeScaling } = given;
  const own = f.object('rope_parameters') ?? f.object('rope_scaling') ?? {};
  const theta = own.rope_theta ?? f.json.rope_theta ?? family.ropeTheta;
  const parameters = { rope_theta: theta, ...(ropeScaling ? override(own, ropeScaling) : own) };
  try {
    const rope = parseRopeConfig({ rope_parameters: parameters, partial_rotary_factor: f.json.partial_rotary_factor });
    ropeInit(rope, { headDim, maxPositionEmbeddings }); // what a kind of scaling needs is checked now, not at the first step
    return rope;
  } catch (error) {
    f.problems.push((error as Error).message);
    return { ropeType: 'default', ropeTheta: 10000 };
  }
}

/**
 * A scaling of the same kind as the model's own changes only what it names: gpt-oss keeps its betas, truncate and original length when only the factor
 * is set. What the model's own factor had brought with it (attention_factor) does not outlive that factor. Another kind keeps the original length.
 */
function override(own: Readonly<Record<string, unknown>>, given: Readonly<Record<string, unknown>>): Record<string, unknown> {
  const kindOf = (x: Readonly<Record<string, unknown>>): unknown => x.rope_type ?? x.type;
  const { attention_factor: _, original_max_position_embeddings: original, ...rest } = own;
  const kept = original === undefined ? {} : { original_max_position_embeddings: original };
  return kindOf(given) === undefined || kindOf(given) === kindOf(own) ? { ...kept, ...rest, ...given } : { ...kept, ...given };
}

export function layersOf(f: FieldReader, architecture: Architecture, count: number): LayerConfig[] {
  const types = f.strings('layer_types');
  if (types && types.length !== count) f.problems.push(`layer_types: expected ${count} entries (num_hidden_layers), got ${types.length}`);
  for (const type of new Set(types ?? [])) {
    if (type !== 'sliding_attention' && type !== 'full_attention')
      f.problems.push(`layer_types: expected sliding_attention or full_attention, got ${JSON.stringify(type)}`);
  }
  const switchable = architecture === 'Qwen2ForCausalLM' || architecture === 'Qwen3ForCausalLM' || architecture === 'Qwen3MoeForCausalLM';
  const on = !switchable || f.bool('use_sliding_window', false);
  const fallback = {
    GptOssForCausalLM: 128,
    LlamaForCausalLM: null,
    MistralForCausalLM: 4096,
    Qwen2ForCausalLM: 4096,
    Qwen3ForCausalLM: 4096,
    Qwen3MoeForCausalLM: 4096,
  };
  const window = architecture !== 'LlamaForCausalLM' && on ? f.intOrNull('sliding_window', fallback[architecture]) : null;
  const maxWindowLayers = f.int('max_window_layers', 28, 0);
  const sparse = sparseLayers(f, architecture);
  return Array.from({ length: count }, (_, i) => ({ window: slides(i) ? window : null, mlp: sparse(i) ? 'moe' : 'dense' }));

  function slides(i: number): boolean {
    if (architecture === 'MistralForCausalLM' || architecture === 'Qwen3MoeForCausalLM') return true;
    if (types) return types[i] === 'sliding_attention';
    return architecture === 'GptOssForCausalLM' ? i % 2 === 0 : i >= maxWindowLayers;
  }
}

function sparseLayers(f: FieldReader, architecture: Architecture): (layer: number) => boolean {
  if (architecture === 'GptOssForCausalLM') return () => true;
  if (architecture !== 'Qwen3MoeForCausalLM') return () => false;
  const step = f.int('decoder_sparse_step', 1);
  const dense = new Set(f.ints('mlp_only_layers'));
  return (layer) => !dense.has(layer) && (layer + 1) % step === 0;
}

export function moeOf(f: FieldReader, architecture: Architecture): MoeConfig | null {
  if (architecture !== 'GptOssForCausalLM' && architecture !== 'Qwen3MoeForCausalLM') return null;
  const gptOss = architecture === 'GptOssForCausalLM';
  const numExperts = f.intOf(['num_local_experts', 'num_experts'], 128);
  const numExpertsPerTok = f.intOf(['num_experts_per_tok', 'experts_per_token'], gptOss ? 4 : 8);
  if (numExpertsPerTok > numExperts) f.problems.push(`num_experts_per_tok: ${numExpertsPerTok} is more than the ${numExperts} experts`);
  return {
    kind: gptOss ? 'gpt_oss' : 'qwen3',
    numExperts,
    numExpertsPerTok,
    intermediateSize: gptOss ? f.int('intermediate_size') : f.int('moe_intermediate_size', 768),
    normTopkProb: gptOss || f.bool('norm_topk_prob', false),
    swigluLimit: f.positive('swiglu_limit', 7),
  };
}

export function quantizationOf(f: FieldReader, architecture: Architecture): 'mxfp4' | null {
  const quantization = f.object('quantization_config');
  if (!quantization) return null;
  if (quantization.quant_method === 'mxfp4' && architecture === 'GptOssForCausalLM') return 'mxfp4';
  f.problems.push(
    `quantization_config: expected none, or mxfp4 for gpt-oss, got ${JSON.stringify(quantization.quant_method)}; take the model in bf16: loadIn4bit quantizes it while loading`,
  );
  return null;
}
