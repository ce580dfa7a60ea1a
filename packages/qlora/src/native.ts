import { loadAddon, type Tensor } from '@lc/tensor';

interface AdamLists {
  values: readonly Tensor[];
  grads: readonly Tensor[];
  m: readonly Tensor[];
  v: readonly Tensor[];
  /** 8 bits only. */
  mScale?: readonly Tensor[];
  vScale?: readonly Tensor[];
}

/** What native/addon.cc exports. */
export interface QloraNative {
  /** false: a value is not finite. */
  nf4Quantize(args: { x: Tensor; codes: Tensor; absmax: Tensor; block: number }): boolean;
  doubleQuantize(args: { absmax: Tensor; codes: Tensor; scales: Tensor; offset: Tensor }): void;
  nf4Dequantize(args: {
    codes: Tensor;
    out: Tensor;
    block: number;
    absmax?: Tensor;
    codes2?: Tensor;
    scales?: Tensor;
    offset?: Tensor;
  }): void;
  /** false: a value is not finite. */
  mxfp4Quantize(args: { x: Tensor; blocks: Tensor; scales: Tensor }): boolean;
  mxfp4Dequantize(args: { blocks: Tensor; scales: Tensor; out: Tensor }): void;
  /** out f32 [256]. */
  dynamicMap(args: { out: Tensor; signed: boolean }): void;
  dropout(args: { x: Tensor; out: Tensor; p: number; seed: number; site: number; start: number; accumulate?: boolean }): void;
  uniform(args: { out: Tensor; seed: number; site: number; low: number; high: number }): void;
  gatherExpertB(args: { b: Tensor; grouped: Tensor }): void;
  scatterExpertB(args: { b: Tensor; grouped: Tensor }): void;
  gradNorm(args: { grads: readonly Tensor[] }): number;
  adamw(
    args: AdamLists & {
      bits: 8 | 32;
      beta1: number;
      beta2: number;
      eps: number;
      decay: number;
      stepSize: number;
      rootBias2: number;
      gradScale: number;
    },
  ): void;
}

export const native = loadAddon<QloraNative>({ packageName: '@lc/qlora', from: import.meta.url });
