/** Devices, streams and events. On the CPU every launch completes before it returns, so its streams and events are complete at once: same code path. */
import { copy as copyNow } from './copy.js';
import { type Device, type DeviceLike, parseDevice } from './dtype.js';
import { LcError } from './errors.js';
import { memInfo } from './memory.js';
import { buildInfo } from './native.js';
import type { Tensor } from './tensor.js';

/** One device that tensors can live on. */
export interface DeviceInfo {
  device: Device;
  name: string;
  /** e.g. '9.0'; undefined for the CPU. */
  computeCapability?: string;
  totalBytes: number;
  freeBytes: number;
}

/** Work in order on one device. */
export class Stream implements Disposable {
  readonly device: Device;
  constructor(device: DeviceLike = 'cpu') {
    this.device = parseDevice(device).device;
    if (this.device.startsWith('cuda')) requireDevice(this.device);
  }
  /** dst = src, ordered on this stream. */
  copy(dst: Tensor, src: Tensor): void {
    copyNow(dst, src);
  }
  /** Later work of this stream starts after `event`. */
  wait(_event: Event): void {}
  /** Resolves when everything queued so far is done. */
  async sync(): Promise<void> {}
  dispose(): void {}
  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** A point in a stream. */
export class Event implements Disposable {
  readonly device: Device;
  constructor(device: DeviceLike = 'cpu') {
    this.device = parseDevice(device).device;
  }
  record(_stream: Stream): void {}
  /** Whether everything before it is done. */
  query(): boolean {
    return true;
  }
  async sync(): Promise<void> {}
  dispose(): void {}
  [Symbol.dispose](): void {
    this.dispose();
  }
}

const streams = new Map<Device, Stream>();

/** The compute stream that a device's workspaces use unless told otherwise. */
export function defaultStream(device: DeviceLike = 'cpu'): Stream {
  const { device: name } = parseDevice(device);
  const key = name === 'host' ? 'cpu' : name;
  let stream = streams.get(key);
  if (!stream) {
    stream = new Stream(key);
    streams.set(key, stream);
  }
  return stream;
}

/** The CPU, and every usable GPU. */
export function devices(): DeviceInfo[] {
  const { freeBytes, totalBytes } = memInfo('cpu');
  return [{ device: 'cpu', name: 'CPU', totalBytes, freeBytes }];
}

/** @throws ERR_LC_NO_PREBUILD, ERR_LC_NO_DRIVER, ERR_LC_DRIVER_TOO_OLD, ERR_LC_NO_DEVICE or ERR_LC_NO_KERNEL_IMAGE with the fix */
export function requireDevice(device: DeviceLike): void {
  if (parseDevice(device).type !== 2) return;
  if (!buildInfo().cuda) {
    throw new LcError(
      'ERR_LC_NO_PREBUILD',
      'this build of @lc/tensor has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use device "cpu"',
    );
  }
  memInfo(device);
}
