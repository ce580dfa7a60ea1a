import fs from 'node:fs';
import { join } from 'node:path';
import type { RopeConfig } from '@lc/attention';
import { LcError } from '@lc/tensor';
import { families, layersOf, moeOf, quantizationOf, ropeOf } from './config-fields.js';
import { FieldReader } from './json.js';

/** The architectures that `@lc/models` builds, as config.json's `architectures` names them. */
export const architectures = [
  'GptOssForCausalLM',
  'LlamaForCausalLM',
  'MistralForCausalLM',
  'Qwen2ForCausalLM',
  'Qwen3ForCausalLM',
  'Qwen3MoeForCausalLM',
] as const;
/** Architectures that can be loaded, as config.json names them. */
export type Architecture = (typeof architectures)[number];

/** What differs from layer to layer. */
export interface LayerConfig {
  /** Keys a query sees, itself included; null: all earlier ones. */
  readonly window: number | null;
  readonly mlp: 'dense' | 'moe';
}

/** A mixture of experts. */
export interface MoeConfig {
  /** `gpt_oss`: clamped SwiGLU with biases and softmax over the chosen experts; `qwen3`: SwiGLU, softmax over all experts. */
  readonly kind: 'gpt_oss' | 'qwen3';
  readonly numExperts: number;
  readonly numExpertsPerTok: number;
  readonly intermediateSize: number;
  /** Qwen3-MoE: the chosen probabilities are divided by their sum. */
  readonly normTopkProb: boolean;
  /** gpt-oss: gate and up are clamped to this. */
  readonly swigluLimit: number;
}

/** A model's config.json in one spelling, with every default filled in. */
export interface ModelConfig {
  readonly architecture: Architecture;
  readonly modelType: string;
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly numHiddenLayers: number;
  readonly numAttentionHeads: number;
  readonly numKeyValueHeads: number;
  readonly headDim: number;
  readonly rmsNormEps: number;
  readonly tieWordEmbeddings: boolean;
  readonly maxPositionEmbeddings: number;
  /** Bias of q, k, v. */
  readonly qkvBias: boolean;
  /** Bias of o. */
  readonly outBias: boolean;
  /** Bias of a dense MLP's projections. */
  readonly mlpBias: boolean;
  /** Qwen3: RMSNorm of each head's q and k. */
  readonly qkNorm: boolean;
  /** gpt-oss: one learned logit per head that takes part in the softmax. */
  readonly sinks: boolean;
  readonly rope: RopeConfig;
  readonly layers: readonly LayerConfig[];
  readonly moe: MoeConfig | null;
  /** How the checkpoint stores the experts: as the model's dtype, or as OpenAI's MXFP4 blocks. */
  readonly quantization: 'mxfp4' | null;
  readonly bosTokenId: number | null;
  readonly eosTokenId: readonly number[];
  readonly padTokenId: number | null;
  /** config.json as it lies on disk. */
  readonly raw: Readonly<Record<string, unknown>>;
}

/** What overrides config.json. */
export interface ParseConfigOptions {
  /** Replaces the RoPE scaling of config.json, in its `rope_scaling` spelling, e.g. `{ rope_type: 'yarn', factor: 8 }`; kept as it is by default. */
  ropeScaling?: Readonly<Record<string, unknown>>;
  /** For messages. */
  source?: string;
}

/**
 * Reads config.json's fields, in both the `rope_scaling` + `rope_theta` and the `rope_parameters` spelling.
 * @throws ERR_LC_MODEL for an architecture that is not supported; ERR_LC_CONFIG: one error that lists every field that is wrong
 */
export function parseModelConfig(json: unknown, options: ParseConfigOptions = {}): ModelConfig {
  const { source = 'config.json' } = options;
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw new LcError(
      'ERR_LC_CONFIG',
      `${source}: expected a JSON object, got ${json === null ? 'null' : Array.isArray(json) ? 'an array' : typeof json}`,
    );
  }
  const f = new FieldReader(json as Record<string, unknown>);
  const architecture = architectureOf(f, source);
  const family = families[architecture];
  const hiddenSize = f.int('hidden_size');
  const numHiddenLayers = f.int('num_hidden_layers', undefined, 1, 10_000);
  const numAttentionHeads = f.int('num_attention_heads');
  const numKeyValueHeads = f.int('num_key_value_heads', family.numKeyValueHeads ?? numAttentionHeads);
  const headDim = f.int('head_dim', family.headDim ?? Math.floor(hiddenSize / numAttentionHeads));
  if (numAttentionHeads % numKeyValueHeads !== 0)
    f.problems.push(`num_attention_heads: ${numAttentionHeads} is not a multiple of num_key_value_heads, ${numKeyValueHeads}`);
  if (headDim % 2 !== 0) f.problems.push(`head_dim: RoPE needs an even number, got ${headDim}`);
  f.only('hidden_act', ['silu']);
  f.only('attention_dropout', [0]);
  f.only('pretraining_tp', [1]);
  const gptOss = architecture === 'GptOssForCausalLM';
  const llama = architecture === 'LlamaForCausalLM';
  const qwen2 = architecture === 'Qwen2ForCausalLM';
  const attentionBias = f.bool('attention_bias', gptOss);
  // Mistral and Qwen2 have no such switch in transformers: a field of that name does nothing there, so nothing here.
  const biasSwitch = architecture !== 'MistralForCausalLM' && !qwen2;
  const maxPositionEmbeddings = f.int('max_position_embeddings', family.maxPositionEmbeddings);
  const rope = ropeOf(f, { family, headDim, maxPositionEmbeddings, ropeScaling: options.ropeScaling });
  const config: ModelConfig = {
    architecture,
    modelType: family.modelType,
    vocabSize: f.int('vocab_size'),
    hiddenSize,
    intermediateSize: f.int('intermediate_size'),
    numHiddenLayers,
    numAttentionHeads,
    numKeyValueHeads,
    headDim,
    rmsNormEps: f.positive('rms_norm_eps', family.rmsNormEps),
    tieWordEmbeddings: f.bool('tie_word_embeddings', false),
    maxPositionEmbeddings,
    qkvBias: qwen2 || (biasSwitch && attentionBias),
    outBias: biasSwitch && attentionBias,
    mlpBias: llama && f.bool('mlp_bias', false),
    qkNorm: architecture === 'Qwen3ForCausalLM' || architecture === 'Qwen3MoeForCausalLM',
    sinks: gptOss,
    rope,
    layers: layersOf(f, architecture, numHiddenLayers),
    moe: moeOf(f, architecture),
    quantization: quantizationOf(f, architecture),
    bosTokenId: f.ids('bos_token_id')[0] ?? null,
    eosTokenId: f.ids('eos_token_id'),
    padTokenId: f.ids('pad_token_id')[0] ?? null,
    raw: f.json,
  };
  if (f.problems.length > 0) {
    throw new LcError(
      'ERR_LC_CONFIG',
      `${source}: ${f.problems.length === 1 ? 'a field is' : `${f.problems.length} fields are`} wrong or not supported:\n  ${f.problems.join('\n  ')}`,
    );
  }
  return config;
}

/** Reads and parses `folder/config.json`. @throws ERR_LC_IO, ERR_LC_CONFIG, ERR_LC_MODEL */
export function readModelConfig(folder: string, options: ParseConfigOptions = {}): ModelConfig {
  const source = join(folder, 'config.json');
  let text: string;
  try {
    text = fs.readFileSync(source, 'utf8');
  } catch (cause) {
    throw new LcError('ERR_LC_IO', `${source}: cannot read: ${(cause as Error).message}; pass a Hugging Face model folder`, { cause });
  }
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new LcError('ERR_LC_CONFIG', `${source}: is not JSON: ${(cause as Error).message}; download it again`, { cause });
  }
  return parseModelConfig(json, { ...options, source });
}

function architectureOf(f: FieldReader, source: string): Architecture {
  const named = f.strings('architectures');
  const modelType = f.json.model_type;
  const found = named ? architectures.find((a) => named[0] === a) : architectures.find((a) => families[a].modelType === modelType);
  if (!found) {
    const got = named ? `architectures ${JSON.stringify(named)}` : `model_type ${JSON.stringify(modelType)}`;
    throw new LcError('ERR_LC_MODEL', `${source}: unknown architecture: ${got}; supported: ${architectures.join(', ')}`);
  }
  if (modelType !== undefined && modelType !== families[found].modelType)
    f.problems.push(`model_type: expected ${families[found].modelType} for ${found}, got ${JSON.stringify(modelType)}`);
  return found;
}
