import { loadAddon, type Stream, type Tensor } from '@lc/tensor';

/** Memory of one forward or backward call beyond its arguments; see plan.ts. CUDA has neither: `scratch` is null and `slots` 0. */
export interface Scratch {
  scratch: Tensor | null;
  /** How many threads may work at once: the scratch holds a piece for each. */
  slots: number;
}

export type Isa = 'generic' | 'avx2' | 'avx512';

interface CommonArgs {
  q: Tensor;
  k: Tensor;
  v: Tensor;
  out: Tensor;
  lse: Tensor;
  start: number;
  /** 0: no window. */
  window: number;
  sinks: Tensor | null;
  docStart: Tensor | null;
  scale: number;
  /** Read on CUDA. */
  stream?: Stream;
}

/** What native/addon.cc exports. */
export interface AttentionNative {
  forward(args: CommonArgs & Scratch): void;
  backward(
    args: CommonArgs &
      Scratch & {
        dout: Tensor;
        dq: Tensor;
        dk: Tensor;
        dv: Tensor;
        dSinks: Tensor | null;
        delta: Tensor;
        /** CPU: dQ of the key segments 1.. ; CUDA: partial sums of dSinks. */
        partial: Tensor | null;
        segments: number;
        /** CUDA, in no fixed order: where dQ is summed; null or missing: deterministic. */
        dqSum?: Tensor | null;
        /** Hopper cards: scratch of `hopperFloats`. */
        hopper?: Tensor | null;
        /** Hopper cards: dQ may be summed in no fixed order. */
        anyOrder?: boolean;
      },
  ): void;
  /** Whether attention on the present GPU takes Hopper's kernels; null: there is no GPU, or this build has no code for one. */
  hopper(): boolean | null;
  rope(args: {
    x: Tensor;
    start: number;
    docStart: Tensor | null;
    invFreq: Float64Array;
    factor: number;
    transpose: boolean;
    stream?: Stream;
  }): void;
  /** f32 elements of scratch per thread. */
  scratch(args: { headDim: number }): { forward: number; backward: number };
  /** The instruction set that the kernels use. Tests choose another; null: this machine lacks it. */
  isa(use?: Isa): Isa | null;
}

export const native = loadAddon<AttentionNative>({ packageName: '@lc/attention', from: import.meta.url });
