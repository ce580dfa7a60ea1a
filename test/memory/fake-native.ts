/**
 * Native code that allocates and computes nothing: with it a training step on 'cuda' runs all of its TypeScript, and so the real sequence of allocations of any model
 * and length, on a machine without a GPU and in milliseconds.
 */
interface Fake {
  bytes: number;
  device: string;
  label: string;
  buffer?: ArrayBuffer;
}
export interface Count {
  live: number;
  peak: number;
  allocations: number;
}

/** What the machine can do. */
export const machine = { pins: true };

export const counts = new Map<string, Count>();
export function count(key: string): Count {
  const found = counts.get(key) ?? { live: 0, peak: 0, allocations: 0 };
  counts.set(key, found);
  return found;
}
const add = (fake: Fake, sign: number): void => {
  for (const key of [fake.device, `${fake.device} ${fake.label}`]) {
    const c = count(key);
    c.live += sign * fake.bytes;
    if (sign > 0) c.allocations++;
    c.peak = Math.max(c.peak, c.live);
  }
};

const item = [4, 2, 2, 4, 8, 1];
const info = { version: 'fake', abi: '0', cuda: true, compiler: 'none' };
const known: Record<string, unknown> = {
  buildInfo: info,
  api: {},
  adopted: false,
  numThreads: () => 1,
  alloc(dtype: number, shape: readonly number[], type: number, id: number, _zero: boolean, label: string): Fake {
    const bytes = shape.reduce((a, b) => a * b, 1) * (item[dtype] as number);
    const fake = { bytes, device: type === 2 ? `cuda:${id}` : type === 3 ? 'host' : 'cpu', label };
    add(fake, 1);
    return fake;
  },
  dispose(fake: Fake): boolean {
    if (fake.device !== 'borrowed') add(fake, -1);
    return true;
  },
  fromTypedArray: (array: NodeJS.TypedArray): Fake => ({ bytes: array.byteLength, device: 'borrowed', label: '' }),
  buffer(fake: Fake): { buffer: ArrayBuffer } {
    fake.buffer ??= new ArrayBuffer(fake.bytes);
    return { buffer: fake.buffer };
  },
  memory: () => ({}),
  memInfo: () => ({ freeBytes: 2 ** 50, totalBytes: 2 ** 50, liveBytes: 0, peakBytes: 0 }),
  cudaDevices: () => [],
  cudaDefaultStream: () => 1n,
  cudaStreamCreate: () => 2n,
  cudaEventCreate: () => 3n,
  cudaEventQuery: () => true,
  cudaStreamSync: async () => {},
  cudaEventSync: async () => {},
  cudaIsPinned: () => machine.pins,
  cublasLtPath: () => '',
  scratch: () => ({ forward: 0, backward: 0 }),
};
const nothing = (): number => 1; // 'worked'
const native = new Proxy(known, { get: (target, name) => (name in target ? target[name as string] : nothing) });

export const core = (): unknown => native;
export const loadAddon = (): (() => unknown) => () => native;
export const buildInfo = (): typeof info => info;
export const numThreads = (): number => 1;
