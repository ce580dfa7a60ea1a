/** Models of real dimensions with random weights in the real formats, for benches: nothing is read from disk. */
import { copy, type DType, dtypeBytes, empty, fill, LcError, Scope, type Tensor, type TypedArray } from '@lc/tensor';
import type { SafetensorsReader, TensorInfo } from '@lc/tensor/safetensors';
import type { CausalLM } from './causal-lm.js';
import { parseModelConfig } from './config.js';
import { buildModel, type LoadOptions } from './load.js';
import { attachLora } from './lora.js';
import { expectedTensors, expertLayoutOf } from './tensors.js';

/** config.json of models that benches know by name. */
const gptOss = (layers: number, experts: number): Record<string, unknown> => ({
  architectures: ['GptOssForCausalLM'],
  model_type: 'gpt_oss',
  attention_bias: true,
  head_dim: 64,
  hidden_act: 'silu',
  hidden_size: 2880,
  intermediate_size: 2880,
  max_position_embeddings: 131072,
  num_attention_heads: 64,
  num_key_value_heads: 8,
  num_hidden_layers: layers,
  num_local_experts: experts,
  num_experts_per_tok: 4,
  rms_norm_eps: 1e-5,
  rope_theta: 150000,
  rope_scaling: { rope_type: 'yarn', factor: 32, beta_fast: 32, beta_slow: 1, original_max_position_embeddings: 4096, truncate: false },
  sliding_window: 128,
  swiglu_limit: 7,
  tie_word_embeddings: false,
  vocab_size: 201088,
  eos_token_id: 200002,
  pad_token_id: 199999,
  quantization_config: { quant_method: 'mxfp4' },
});

export const presets: Readonly<Record<string, Record<string, unknown>>> = {
  'gpt-oss-20b': gptOss(24, 32),
  'gpt-oss-120b': gptOss(36, 128),
  'Llama-3.1-8B': {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    hidden_act: 'silu',
    hidden_size: 4096,
    intermediate_size: 14336,
    max_position_embeddings: 131072,
    num_attention_heads: 32,
    num_key_value_heads: 8,
    num_hidden_layers: 32,
    rms_norm_eps: 1e-5,
    rope_theta: 500000,
    rope_scaling: { rope_type: 'llama3', factor: 8, high_freq_factor: 4, low_freq_factor: 1, original_max_position_embeddings: 8192 },
    tie_word_embeddings: false,
    vocab_size: 128256,
    eos_token_id: 128001,
  },
};

const BLOCK = 1 << 20;

/** Random tensors where a checkpoint's reader is expected: norms are one, weights normal with deviation 0.02, MXFP4 codes any, their scales 2^-7. */
class RandomWeights implements SafetensorsReader {
  readonly path = '(random weights)';
  readonly metadata = {};
  readonly names: readonly string[];
  private readonly infos: ReadonlyMap<string, TensorInfo>;
  private readonly scope = new Scope();
  private readonly blocks = new Map<DType, Tensor>();

  constructor(tensors: readonly TensorInfo[]) {
    this.infos = new Map(tensors.map((t) => [t.name, t]));
    this.names = [...this.infos.keys()];
  }
  has(name: string): boolean {
    return this.infos.has(name);
  }
  info(name: string): TensorInfo {
    const info = this.infos.get(name);
    if (!info) throw new LcError('ERR_LC_SAFETENSORS', `${this.path}: no tensor '${name}'`);
    return info;
  }
  read<T extends TypedArray>(): Promise<T> {
    throw new LcError('ERR_LC_ARGUMENT', `${this.path}: only readInto`);
  }
  async readInto(name: string, target: Tensor): Promise<void> {
    if (name.endsWith('norm.weight')) return fill(target, 1);
    if (name.endsWith('_scales')) return fill(target, 120);
    const flat = target.view([target.numel]);
    const block = this.block(this.info(name).dtype);
    for (let at = 0; at < flat.numel; at += BLOCK) {
      const n = Math.min(BLOCK, flat.numel - at);
      copy(flat.rows(at, n), block.rows(0, n));
    }
  }
  close(): void {
    this.scope.dispose();
  }
  [Symbol.dispose](): void {
    this.close();
  }

  private block(dtype: DType): Tensor {
    let block = this.blocks.get(dtype);
    if (!block) {
      block = this.scope.own(empty([BLOCK], { dtype, label: 'random' }));
      let state = 12345;
      const next = (): number => {
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
        return state / 4294967296;
      };
      if (dtype === 'u8') {
        const bytes = block.data<Uint8Array>();
        for (let i = 0; i < BLOCK; i++) bytes[i] = next() * 256;
      } else {
        using wide = empty([BLOCK], { label: 'random' });
        const values = wide.data();
        for (let i = 0; i < BLOCK; i++) values[i] = 0.02 * Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
        copy(block, wide);
      }
      this.blocks.set(dtype, block);
    }
    return block;
  }
}

export interface SyntheticOptions extends LoadOptions {
  /** Fewer layers than the model has. */
  layers?: number;
}

/**
 * A model of a preset's dimensions with random weights.
 * @throws ERR_LC_CONFIG for an unknown preset, and as `loadModel`
 */
export async function syntheticModel(preset: string, options: SyntheticOptions = {}): Promise<CausalLM> {
  const known = presets[preset];
  if (!known) throw new LcError('ERR_LC_CONFIG', `no preset '${preset}'; there are ${Object.keys(presets).join(', ')}`);
  const { layers, lora, ...load } = options;
  const config = parseModelConfig({ ...known, ...(layers === undefined ? {} : { num_hidden_layers: layers }) });
  const experts = expertLayoutOf(config, () => false);
  const tensors = expectedTensors(config, experts).map(({ name, shape, raw }): TensorInfo => {
    const dtype: DType = raw ? 'u8' : 'bf16';
    return {
      name,
      shape,
      dtype,
      fileDtype: raw ? 'U8' : 'BF16',
      offset: 0,
      file: '(random weights)',
      nbytes: shape.reduce((a, b) => a * b, 1) * dtypeBytes[dtype],
    };
  });
  using reader = new RandomWeights(tensors);
  const scope = new Scope();
  try {
    const model = await buildModel(null, config, reader, experts, scope, load);
    if (lora) attachLora(model, lora);
    return model;
  } catch (error) {
    scope.dispose();
    throw error;
  }
}
