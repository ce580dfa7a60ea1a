import { LcError } from '@lc/tensor';
import type { SafetensorsReader, TensorInfo } from '@lc/tensor/safetensors';
import type { ModelConfig } from './config.js';

/** Which tensors hold a layer's experts. */
export type ExpertLayout =
  /** gpt-oss in bf16: `gate_up_proj` [experts, hidden, 2 * intermediate] and `down_proj` [experts, intermediate, hidden], inputs first. */
  | 'gpt_oss'
  /** gpt-oss in MXFP4: `*_blocks` [experts, out, in / 32, 16] and `*_scales` [experts, out, in / 32], u8. */
  | 'mxfp4'
  /** One `gate_proj`, `up_proj`, `down_proj` per expert, as on the Hub. */
  | 'per_expert'
  /** `gate_up_proj` [experts, 2 * intermediate, hidden] (gate above up) and `down_proj` [experts, hidden, intermediate], as transformers 5 keeps them. */
  | 'fused';

/** One tensor that a checkpoint must hold. */
export interface TensorSpec {
  readonly name: string;
  readonly shape: readonly number[];
  /** Raw bytes (MXFP4) instead of bf16, f16 or f32. */
  readonly raw?: boolean;
}

/** Which way the checkpoint stores its experts; null for dense models. */
export function expertLayoutOf(config: ModelConfig, has: (name: string) => boolean): ExpertLayout | null {
  const moe = config.layers.findIndex((layer) => layer.mlp === 'moe');
  if (!config.moe || moe < 0) return null;
  if (config.moe.kind === 'gpt_oss') return config.quantization === 'mxfp4' ? 'mxfp4' : 'gpt_oss';
  return has(`model.layers.${moe}.mlp.experts.gate_up_proj`) ? 'fused' : 'per_expert';
}

/** Every tensor of the model, by its Hugging Face name. */
export function expectedTensors(config: ModelConfig, experts: ExpertLayout | null): TensorSpec[] {
  const { hiddenSize: h, vocabSize, headDim } = config;
  const specs: TensorSpec[] = [
    { name: 'model.embed_tokens.weight', shape: [vocabSize, h] },
    { name: 'model.norm.weight', shape: [h] },
  ];
  if (!config.tieWordEmbeddings) specs.push({ name: 'lm_head.weight', shape: [vocabSize, h] });
  const linear = (name: string, out: number, inner: number, bias: boolean): void => {
    specs.push({ name: `${name}.weight`, shape: [out, inner] });
    if (bias) specs.push({ name: `${name}.bias`, shape: [out] });
  };
  const q = config.numAttentionHeads * headDim;
  const kv = config.numKeyValueHeads * headDim;
  config.layers.forEach((layer, i) => {
    const prefix = `model.layers.${i}`;
    specs.push({ name: `${prefix}.input_layernorm.weight`, shape: [h] }, { name: `${prefix}.post_attention_layernorm.weight`, shape: [h] });
    linear(`${prefix}.self_attn.q_proj`, q, h, config.qkvBias);
    linear(`${prefix}.self_attn.k_proj`, kv, h, config.qkvBias);
    linear(`${prefix}.self_attn.v_proj`, kv, h, config.qkvBias);
    linear(`${prefix}.self_attn.o_proj`, h, q, config.outBias);
    if (config.qkNorm)
      specs.push(
        { name: `${prefix}.self_attn.q_norm.weight`, shape: [headDim] },
        { name: `${prefix}.self_attn.k_norm.weight`, shape: [headDim] },
      );
    if (config.sinks) specs.push({ name: `${prefix}.self_attn.sinks`, shape: [config.numAttentionHeads] });
    if (layer.mlp === 'moe') specs.push(...expertTensors(config, `${prefix}.mlp`, experts));
    else {
      linear(`${prefix}.mlp.gate_proj`, config.intermediateSize, h, config.mlpBias);
      linear(`${prefix}.mlp.up_proj`, config.intermediateSize, h, config.mlpBias);
      linear(`${prefix}.mlp.down_proj`, h, config.intermediateSize, config.mlpBias);
    }
  });
  return specs;
}

function expertTensors(config: ModelConfig, prefix: string, layout: ExpertLayout | null): TensorSpec[] {
  const h = config.hiddenSize;
  const { numExperts: e = 0, intermediateSize: m = 0 } = config.moe ?? {};
  if (layout === 'per_expert' || layout === 'fused') {
    const router = { name: `${prefix}.gate.weight`, shape: [e, h] };
    if (layout === 'fused')
      return [
        router,
        { name: `${prefix}.experts.gate_up_proj`, shape: [e, 2 * m, h] },
        { name: `${prefix}.experts.down_proj`, shape: [e, h, m] },
      ];
    const each = Array.from({ length: e }, (_, i) => [
      { name: `${prefix}.experts.${i}.gate_proj.weight`, shape: [m, h] },
      { name: `${prefix}.experts.${i}.up_proj.weight`, shape: [m, h] },
      { name: `${prefix}.experts.${i}.down_proj.weight`, shape: [h, m] },
    ]);
    return [router, ...each.flat()];
  }
  const specs: TensorSpec[] = [
    { name: `${prefix}.router.weight`, shape: [e, h] },
    { name: `${prefix}.router.bias`, shape: [e] },
    { name: `${prefix}.experts.gate_up_proj_bias`, shape: [e, 2 * m] },
    { name: `${prefix}.experts.down_proj_bias`, shape: [e, h] },
  ];
  if (layout === 'mxfp4') {
    for (const [name, out, inner] of [
      ['gate_up_proj', 2 * m, h],
      ['down_proj', h, m],
    ] as const) {
      specs.push(
        { name: `${prefix}.experts.${name}_blocks`, shape: [e, out, inner / 32, 16], raw: true },
        { name: `${prefix}.experts.${name}_scales`, shape: [e, out, inner / 32], raw: true },
      );
    }
  } else
    specs.push({ name: `${prefix}.experts.gate_up_proj`, shape: [e, h, 2 * m] }, { name: `${prefix}.experts.down_proj`, shape: [e, m, h] });
  return specs;
}

/** Buffers that older checkpoints carry and that transformers computes from config.json instead. */
const computed = /^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$/;

/**
 * Holds a checkpoint against its config.json. A tied model may carry its embedding a second time as `lm_head.weight`: it is not read.
 * @throws ERR_LC_MODEL: one error that lists every missing, extra and misshapen tensor
 */
export function checkTensors(reader: SafetensorsReader, config: ModelConfig): { specs: TensorSpec[]; experts: ExpertLayout | null } {
  const experts = expertLayoutOf(config, (name) => reader.has(name));
  const specs = expectedTensors(config, experts);
  const wanted = new Set(specs.map((spec) => spec.name));
  const missing: string[] = [];
  const misshapen: string[] = [];
  for (const spec of specs) {
    if (!reader.has(spec.name)) missing.push(`${spec.name} [${spec.shape.join(',')}]`);
    else {
      const wrong = mismatch(reader.info(spec.name), spec);
      if (wrong) misshapen.push(wrong);
    }
  }
  const extra = reader.names.filter(
    (name) => !wanted.has(name) && !computed.test(name) && !(config.tieWordEmbeddings && name === 'lm_head.weight'),
  );
  const groups = [
    ['missing', missing],
    ['not expected', extra],
    ['wrong shape or dtype', misshapen],
  ] as const;
  const problems = groups.filter(([, list]) => list.length > 0).map(([what, list]) => `  ${what} (${list.length}): ${list.join(', ')}`);
  if (problems.length > 0) {
    throw new LcError(
      'ERR_LC_MODEL',
      `${reader.path}: the tensors do not match config.json (${config.architecture}):\n${problems.join('\n')}\nconfig.json and the weights must come from the same model and be complete`,
    );
  }
  return { specs, experts };
}

function mismatch(info: TensorInfo, spec: TensorSpec): string | null {
  const same = info.shape.length === spec.shape.length && info.shape.every((size, i) => size === spec.shape[i]);
  const dtypes = spec.raw ? ['U8'] : ['BF16', 'F16', 'F32'];
  if (same && dtypes.includes(info.fileDtype)) return null;
  return `${spec.name} is ${info.fileDtype} [${info.shape.join(',')}], expected ${dtypes.join('/')} [${spec.shape.join(',')}]`;
}
