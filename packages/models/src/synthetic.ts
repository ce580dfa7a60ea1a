/** Models of real dimensions with random weights in the real formats, for benches: nothing is read from disk. */
import { copy, type Device, type DType, dtypeBytes, empty, fill, LcError, Scope, type Tensor, type TypedArray } from '@lc/tensor';
import type { SafetensorsReader, TensorInfo } from '@lc/tensor/safetensors';
import type { CausalLM } from './causal-lm.js';
import { parseModelConfig } from './config.js';
import { buildModel, type LoadOptions } from './load.js';
import { attachLora } from './lora.js';
import { presets } from './presets.js';
import { expectedTensors, expertLayoutOf } from './tensors.js';

const BLOCK = 1 << 20;

/** `out` = random values, the same for a seed: any bytes in u8, else normal numbers of the given deviation. A pattern of 2^20 values is repeated: it is for benches. */
export function fillRandom(out: Tensor, options: { seed?: number; std?: number } = {}): void {
  using block = randomBlock(out.dtype, options.seed ?? 12345, options.std ?? 0.02, Math.min(BLOCK, out.numel));
  repeat(out, block);
}

function repeat(out: Tensor, block: Tensor): void {
  const flat = out.view([out.numel]);
  for (let at = 0; at < flat.numel; at += BLOCK) {
    const n = Math.min(BLOCK, flat.numel - at);
    copy(flat.rows(at, n), block.rows(0, n));
  }
}

/** [size] on the CPU. */
function randomBlock(dtype: DType, seed: number, std: number, size = BLOCK): Tensor {
  const block = empty([size], { dtype, label: 'random' });
  let state = seed >>> 0;
  const next = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 4294967296;
  };
  if (dtype === 'u8') {
    const bytes = block.data<Uint8Array>();
    for (let i = 0; i < size; i++) bytes[i] = next() * 256;
    return block;
  }
  using wide = empty([size], { label: 'random' });
  const values = wide.data();
  for (let i = 0; i < size; i++) values[i] = std * Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
  copy(block, wide);
  return block;
}

/** Random tensors where a checkpoint's reader is expected: norms are one, weights normal with deviation 0.02, MXFP4 codes any, their scales 2^-7. */
class RandomWeights implements SafetensorsReader {
  readonly path = '(random weights)';
  readonly metadata = {};
  readonly names: readonly string[];
  private readonly infos: ReadonlyMap<string, TensorInfo>;
  private readonly scope = new Scope();
  private readonly blocks = new Map<string, Tensor>();

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
    repeat(target, this.block(this.info(name).dtype, target.device));
  }
  close(): void {
    this.scope.dispose();
  }
  [Symbol.dispose](): void {
    this.close();
  }

  /** Where the target lies: a GPU copies faster from itself than from pageable memory. */
  private block(dtype: DType, device: Device): Tensor {
    const key = `${dtype} on ${device}`;
    let block = this.blocks.get(key);
    if (!block) {
      if (device === 'cpu') block = this.scope.own(randomBlock(dtype, 12345, 0.02));
      else {
        block = this.scope.own(empty([BLOCK], { dtype, device, label: 'random' }));
        copy(block, this.block(dtype, 'cpu'));
      }
      this.blocks.set(key, block);
    }
    return block;
  }
}

/** As `loadModel`, and how much of the preset. */
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
