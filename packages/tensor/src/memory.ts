import { type DeviceLike, parseDevice } from './dtype.js';
import { LcTypeError } from './errors.js';
import { core, type DeviceMemory, type MemInfo } from './native.js';

/** Live and peak bytes that lc's allocator holds, per device and label. Borrowed memory (typed arrays, pointers, DLPack) is not counted. */
export function memory(): { devices: Record<string, DeviceMemory> } {
  return { devices: core().memory() };
}

/** Counters of one device; zeros when nothing was ever allocated there. */
export function deviceMemory(device: DeviceLike): DeviceMemory {
  const empty = { liveBytes: 0, peakBytes: 0, liveTensors: 0, allocations: 0, byLabel: {} };
  return core().memory()[parseDevice(device).device] ?? empty;
}

/** Starts a new peak measurement: every peak becomes the live count. */
export function resetPeak(): void {
  core().resetPeak();
}

/** What the device has free now. For the CPU and host: RAM available to this process, cgroup limits included. @throws ERR_LC_NO_DRIVER and its kin */
export function memInfo(device: DeviceLike = 'cpu'): MemInfo {
  const { type, id } = parseDevice(device);
  return core().memInfo(type, id);
}

/** What this process takes, as the driver (of a GPU) or the kernel (of RAM) counts it: everything, not only lc's allocations. */
export interface ProcessMemory {
  bytes: number;
  /**
   * Largest count since the start or the last `resetPeak`. On a GPU: sampled whenever lc's pool grows, and the pool's own high-water mark; on the CPU: the
   * kernel's, since the process began.
   */
  peakBytes: number;
  /** A GPU: what lc's pool holds, and what of it is handed out; the rest of `bytes` is the CUDA context, kernels and libraries. 0 on the CPU. */
  poolBytes: number;
  poolUsedBytes: number;
  /** What `setVramLimit` or `setRamLimit` allows; null: no limit. */
  limitBytes: number | null;
  /**
   * Who counted. 'process': NVML, this process alone. 'device': NVML, in use now less what was in use before our context came, so what others take later counts as
   * ours. 'all': NVML is not there; everything in use on the device counts. 'kernel': resident memory, for the CPU.
   */
  source: 'process' | 'device' | 'all' | 'kernel';
}

const sources = ['kernel', 'process', 'device', 'all'] as const;
let ramLimit: number | null = null;

/** @throws ERR_LC_NO_DRIVER and its kin */
export function processMemory(device: DeviceLike = 'cpu'): ProcessMemory {
  const { type, id } = parseDevice(device);
  if (type !== 2) {
    const peakBytes = process.resourceUsage().maxRSS * 1024;
    return { bytes: process.memoryUsage().rss, peakBytes, poolBytes: 0, poolUsedBytes: 0, limitBytes: ramLimit, source: 'kernel' };
  }
  const { source, limitBytes, ...m } = core().processMemory(id);
  return { ...m, limitBytes: limitBytes || null, source: sources[source] as ProcessMemory['source'] };
}

function requireLimit(op: string, bytes: number | null): number {
  if (bytes !== null && !(Number.isSafeInteger(bytes) && bytes > 0))
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: expected a whole number of bytes > 0, or null for no limit, got ${String(bytes)}`);
  return bytes ?? 0;
}

/**
 * The most that this process may take of a GPU: CUDA context, kernels, cuBLASLt and lc's pool together, as far as the driver tells (`processMemory().source`). An
 * allocation that would exceed it fails with ERR_LC_OUT_OF_MEMORY, and `memInfo` counts within it: a smaller card can be tried on a larger one. (One of at most 32 MiB that
 * finds no gap in the pool may exceed it by as much until it is refused, microseconds later.) null: no limit.
 *
 * @throws ERR_LC_OUT_OF_MEMORY when more is taken already (then the old limit stays), ERR_LC_ARGUMENT, ERR_LC_DEVICE, ERR_LC_NO_DRIVER and its kin
 */
export function setVramLimit(device: DeviceLike, bytes: number | null): void {
  const { device: name, type, id } = parseDevice(device);
  if (type !== 2)
    throw new LcTypeError('ERR_LC_DEVICE', `setVramLimit: expected a cuda device, got '${name}'; setRamLimit limits CPU and host memory`);
  core().setMemoryLimit(type, id, requireLimit('setVramLimit', bytes));
}

/**
 * The most that lc's allocator may take of RAM, 'cpu' and 'host' together; what is borrowed, and Node's own memory, does not count. null: no limit.
 * @throws ERR_LC_ARGUMENT
 */
export function setRamLimit(bytes: number | null): void {
  core().setMemoryLimit(1, 0, requireLimit('setRamLimit', bytes));
  ramLimit = bytes;
}
