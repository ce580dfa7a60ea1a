import { type DeviceLike, parseDevice } from './dtype.js';
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
