import { DenseWeight, Mxfp4Weight, Nf4Weight, QuantizedExpertLinear, QuantizedLinear, type WeightStorage } from '@lc/qlora';
import {
  copy,
  type Device,
  type DType,
  type ExpertLinear,
  empty,
  fill,
  LcError,
  type Linear,
  PlainExpertLinear,
  PlainLinear,
  type Scope,
  type Tensor,
} from '@lc/tensor';
import type { SafetensorsReader } from '@lc/tensor/safetensors';
import { nonFinite, transposeInto } from './arrays.js';

export interface WeightOptions {
  readonly device: Device;
  /** What layers compute in: f32 on the CPU, bf16 on CUDA. */
  readonly computeDtype: DType;
  /** What linears and experts that are not quantized are kept in; another dtype than the compute dtype is converted layer by layer, pass by pass. */
  readonly dtype: DType;
  /** Quantize linears and experts to NF4. */
  readonly loadIn4bit: boolean;
}

/** Reads a checkpoint's tensors into what layers are made of. Everything it makes is owned by `scope`. */
export class WeightLoader {
  /** Tensors that hold NaN or infinity; told all at once by `finish`. */
  private readonly bad: string[] = [];

  constructor(
    private readonly reader: SafetensorsReader,
    private readonly scope: Scope,
    private readonly options: WeightOptions,
  ) {}

  /** @throws ERR_LC_NAN: one error that lists every tensor with a value that is not finite */
  finish(): void {
    if (this.bad.length === 0) return;
    throw new LcError(
      'ERR_LC_NAN',
      `${this.reader.path}: NaN or infinite values in ${this.bad.join(', ')}; the checkpoint is damaged: download it again, or take an earlier one`,
    );
  }

  /** A tensor in the compute dtype, or another. */
  async dense(name: string, dtype = this.options.computeDtype): Promise<Tensor> {
    const out = this.scope.own(empty(this.reader.info(name).shape, { dtype, device: this.options.device, label: 'weights' }));
    await this.fill(name, out);
    return out;
  }

  /** `prefix.weight` [out, in] and, with `bias`, `prefix.bias`. */
  async linear(prefix: string, bias: boolean): Promise<Linear> {
    const biasTensor = bias ? await this.dense(`${prefix}.bias`) : null;
    const { shape } = this.reader.info(`${prefix}.weight`);
    const weight = await this.storage(shape, (out) => this.fill(`${prefix}.weight`, out));
    const plain = weight.plain(this.options.computeDtype);
    return plain ? new PlainLinear({ weight: plain, bias: biasTensor }) : new QuantizedLinear({ weight, bias: biasTensor });
  }

  /** gpt-oss: `name` [experts, in, out] in bf16. */
  expertsInputsFirst(name: string): Promise<ExpertLinear> {
    const [experts, inner, outer] = this.reader.info(name).shape as [number, number, number];
    return this.experts([experts, outer, inner], async (out) => {
      using staging = empty([1, inner, outer], { dtype: out.dtype, label: 'load' });
      for (let e = 0; e < experts; e++) {
        await this.fill(name, staging, e);
        transposeInto(out.rows(e, 1).data(), staging.data(), inner, outer);
      }
    });
  }

  /** gpt-oss: `name_blocks` and `name_scales`. The checkpoint's own 4 bits are kept as they are. */
  async expertsMxfp4(name: string): Promise<ExpertLinear> {
    const raw = async (suffix: string): Promise<Tensor> => {
      const out = this.scope.own(
        empty(this.reader.info(`${name}_${suffix}`).shape, { dtype: 'u8', device: this.options.device, label: 'mxfp4' }),
      );
      await this.reader.readInto(`${name}_${suffix}`, out);
      return out;
    };
    const blocks = await raw('blocks');
    const scales = await raw('scales');
    if (scales.device === 'cpu' && scales.data<Uint8Array>().includes(255)) this.note(`${name}_scales`); // E8M0: 255 is NaN
    return new QuantizedExpertLinear({ weight: new Mxfp4Weight({ blocks, scales }) });
  }

  /** transformers 5: `name` [experts, out, in]. */
  expertsFused(name: string): Promise<ExpertLinear> {
    return this.experts(this.reader.info(name).shape, (out) => this.fill(name, out));
  }

  /** One matrix per expert, several of them (gate, up) stacked along the outputs. `names(e)` gives them in order. */
  expertsStacked(experts: number, names: (expert: number) => readonly string[]): Promise<ExpertLinear> {
    const rows = names(0).map((name) => this.reader.info(name).shape[0] as number);
    const inner = this.reader.info(names(0)[0] as string).shape[1] as number;
    const outer = rows.reduce((a, b) => a + b, 0);
    return this.experts([experts, outer, inner], async (out) => {
      const flat = out.view([experts * outer, inner]);
      for (let e = 0; e < experts; e++) {
        let at = e * outer;
        for (const [i, name] of names(e).entries()) {
          await this.fill(name, flat.rows(at, rows[i] as number));
          at += rows[i] as number;
        }
      }
    });
  }

  private async experts(shape: readonly number[], write: (out: Tensor) => Promise<void>): Promise<ExpertLinear> {
    const weight = await this.storage(shape, write);
    const plain = weight.plain(this.options.computeDtype);
    return plain ? new PlainExpertLinear({ weight: plain }) : new QuantizedExpertLinear({ weight });
  }

  /** A weight [..., out, in] as the options want it stored. `write` fills a tensor with it. */
  private async storage(shape: readonly number[], write: (out: Tensor) => Promise<void>): Promise<WeightStorage> {
    const { loadIn4bit, dtype, device } = this.options;
    const onGpu = device.startsWith('cuda');
    if (!loadIn4bit) {
      const weight = this.scope.own(new DenseWeight(empty(shape, { dtype, device, label: 'weights' })));
      if (!onGpu) {
        await write(weight.data);
        return weight;
      }
      using staging = empty(shape, { dtype, label: 'load' }); // `write` rearranges on the CPU
      await write(staging);
      copy(weight.data, staging);
      return weight;
    }
    using full = empty(shape, { label: 'load' });
    await write(full);
    if (this.bad.length > 0) fill(full, 0); // `finish` will throw, and name the tensors, which the quantizer cannot
    const quantized = Nf4Weight.quantize(full);
    return this.scope.own(onGpu ? quantized.to(device) : quantized);
  }

  private async fill(name: string, out: Tensor, firstRow?: number): Promise<void> {
    await this.reader.readInto(name, out, firstRow === undefined ? {} : { firstRow });
    if (!out.device.startsWith('cuda') && nonFinite(out.data(), out.dtype)) this.note(name);
  }

  private note(name: string): void {
    if (!this.bad.includes(name)) this.bad.push(name);
  }
}
