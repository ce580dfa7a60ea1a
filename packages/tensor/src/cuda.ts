/** Devices, streams and events. On the CPU every launch completes before it returns, so its streams and events are complete at once: same code path. */
import { type Device, type DeviceLike, parseDevice } from './dtype.js';
import { LcError, LcTypeError } from './errors.js';
import { memInfo } from './memory.js';
import { buildInfo, core } from './native.js';
import type { Tensor } from './tensor.js';

/** What native/cuda_addon.cc exports, in a build with CUDA code. Streams and events are cudaStream_t and cudaEvent_t as bigints. */
interface CudaNative {
  copy(args: { dst: Tensor; src: Tensor; stream: Stream }): void;
  cudaDevices(): DeviceInfo[];
  cudaRequireDevice(id: number): void;
  cudaDefaultStream(id: number): bigint;
  cudaStreamCreate(id: number): bigint;
  cudaStreamDestroy(stream: bigint): void;
  cudaStreamWait(stream: bigint, event: bigint): void;
  cudaStreamSync(stream: bigint, id: number): Promise<void>;
  cudaStreamSynchronize(stream: bigint): void;
  cudaEventCreate(id: number, timing: boolean): bigint;
  cudaEventDestroy(event: bigint): void;
  cudaEventRecord(event: bigint, stream: bigint): void;
  cudaEventQuery(event: bigint): boolean;
  cudaEventSync(event: bigint, id: number): Promise<void>;
  cudaEventElapsed(from: bigint, to: bigint): number;
  cudaIsPinned(args: { x: Tensor }): boolean;
  cublasLtPath(): string;
}
const native = (): CudaNative => core<CudaNative>();

/** One device that tensors can live on. */
export interface DeviceInfo {
  device: Device;
  name: string;
  /** e.g. '9.0'; undefined for the CPU. */
  computeCapability?: string;
  totalBytes: number;
  freeBytes: number;
  /** As nvidia-smi shows it; undefined for the CPU. */
  uuid?: string;
  /** CUDA version that the driver supports; undefined for the CPU. */
  driver?: string;
}

/** Work in order on one device. */
export class Stream implements Disposable {
  readonly device: Device;
  private readonly pointer: bigint;
  private readonly id: number;
  private readonly owned: boolean;
  private closed = false;
  private waiting = 0;

  /** @param handle an existing cudaStream_t to use; it stays its owner's. @throws ERR_LC_NO_DRIVER and its kin for cuda without a usable GPU */
  constructor(device: DeviceLike = 'cpu', handle?: bigint) {
    const { device: name, type, id } = parseDevice(device);
    this.device = name;
    this.id = id;
    this.owned = type === 2 && handle === undefined;
    if (type === 2) requireDevice(name);
    this.pointer = type === 2 ? (handle ?? native().cudaStreamCreate(id)) : 0n;
  }

  /** cudaStream_t, or 0n on the CPU. @throws ERR_LC_DISPOSED */
  get handle(): bigint {
    this.check('handle');
    return this.pointer;
  }

  /** dst = src, ordered on this stream; between host and device asynchronous when the host side is pinned (device 'host'). */
  copy(dst: Tensor, src: Tensor): void {
    this.check('copy');
    native().copy({ dst, src, stream: this });
  }

  /** Later work of this stream starts after what `event` recorded. */
  wait(event: Event): void {
    const [stream, other] = [this.handle, event.handle];
    if (stream && other) native().cudaStreamWait(stream, other);
  }

  /** Resolves when everything queued so far is done; JavaScript goes on meanwhile. @throws ERR_LC_CUDA when some of it failed */
  async sync(): Promise<void> {
    const stream = this.handle;
    if (!stream) return;
    this.waiting++;
    try {
      await native().cudaStreamSync(stream, this.id);
    } finally {
      this.waiting--;
      this.destroy();
    }
  }

  /** As `sync`, but blocks. */
  synchronize(): void {
    const stream = this.handle;
    if (stream) native().cudaStreamSynchronize(stream);
  }

  /** The driver finishes what is queued, then frees the stream. Using it afterwards throws ERR_LC_DISPOSED. */
  dispose(): void {
    if (this.closed || !this.owned) return;
    this.closed = true;
    this.destroy();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  /** A thread may still be waiting for the stream: the last one out frees it. */
  private destroy(): void {
    if (this.closed && this.waiting === 0) native().cudaStreamDestroy(this.pointer);
  }

  private check(op: string): void {
    if (this.closed) throw new LcTypeError('ERR_LC_DISPOSED', `Stream.${op}: the stream on ${this.device} was disposed`);
  }
}

/** A point in a stream. */
export class Event implements Disposable {
  /** On the CPU: when it was recorded. */
  private time = 0;
  readonly device: Device;
  private readonly pointer: bigint;
  private readonly id: number;
  private closed = false;
  private waiting = 0;

  /** @throws ERR_LC_NO_DRIVER and its kin for cuda without a usable GPU */
  constructor(device: DeviceLike = 'cpu', options: { timing?: boolean } = {}) {
    const { device: name, type, id } = parseDevice(device);
    this.device = name;
    this.id = id;
    if (type === 2) requireDevice(name);
    this.pointer = type === 2 ? native().cudaEventCreate(id, options.timing ?? false) : 0n;
  }

  /** cudaEvent_t, or 0n on the CPU. @throws ERR_LC_DISPOSED */
  get handle(): bigint {
    if (this.closed) throw new LcTypeError('ERR_LC_DISPOSED', `Event: the event on ${this.device} was disposed`);
    return this.pointer;
  }

  /** @throws ERR_LC_DEVICE where the stream is on another device */
  record(stream: Stream): void {
    const [event, at] = [this.handle, stream.handle];
    if (event && stream.device !== this.device) {
      throw new LcTypeError('ERR_LC_DEVICE', `Event.record: an event on ${this.device} cannot record a stream on ${stream.device}`);
    }
    if (event) native().cudaEventRecord(event, at);
    else this.time = performance.now();
  }

  /** Whether everything before it is done. */
  query(): boolean {
    const event = this.handle;
    return event ? native().cudaEventQuery(event) : true;
  }

  /** Resolves when everything before it is done; JavaScript goes on meanwhile. @throws ERR_LC_CUDA when some of it failed */
  async sync(): Promise<void> {
    const event = this.handle;
    if (!event) return;
    this.waiting++;
    try {
      await native().cudaEventSync(event, this.id);
    } finally {
      this.waiting--;
      this.destroy();
    }
  }

  /** Milliseconds of device time from `earlier` to this event; both made with `timing`, both done. On the CPU: between the two calls of `record`. */
  elapsedSince(earlier: Event): number {
    const [event, before] = [this.handle, earlier.handle];
    return event ? native().cudaEventElapsed(before, event) : this.time - earlier.time;
  }

  /** Using it afterwards throws ERR_LC_DISPOSED. */
  dispose(): void {
    if (this.closed || !this.pointer) return;
    this.closed = true;
    this.destroy();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  private destroy(): void {
    if (this.closed && this.waiting === 0) native().cudaEventDestroy(this.pointer);
  }
}

const streams = new Map<Device, Stream>();

/** The compute stream that a device's workspaces use unless told otherwise. */
export function defaultStream(device: DeviceLike = 'cpu'): Stream {
  const { device: name, type, id } = parseDevice(device);
  const key = name === 'host' ? 'cpu' : name;
  let stream = streams.get(key);
  if (!stream) {
    if (type === 2) requireDevice(key);
    stream = type === 2 ? new Stream(key, native().cudaDefaultStream(id)) : new Stream('cpu');
    streams.set(key, stream);
  }
  return stream;
}

/** The CPU, and every usable GPU. Without a driver: the CPU only. */
export function devices(): DeviceInfo[] {
  const { freeBytes, totalBytes } = memInfo('cpu');
  const cpu: DeviceInfo = { device: 'cpu', name: 'CPU', totalBytes, freeBytes };
  return buildInfo().cuda ? [cpu, ...native().cudaDevices()] : [cpu];
}

/** @throws ERR_LC_NO_PREBUILD, ERR_LC_NO_DRIVER, ERR_LC_DRIVER_TOO_OLD, ERR_LC_NO_DEVICE or ERR_LC_NO_KERNEL_IMAGE with the fix */
export function requireDevice(device: DeviceLike): void {
  const { type, id } = parseDevice(device);
  if (type !== 2) return;
  if (!buildInfo().cuda) {
    throw new LcError(
      'ERR_LC_NO_PREBUILD',
      'this build of @lc/tensor has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use device "cpu"',
    );
  }
  native().cudaRequireDevice(id);
}

/** Whether a 'host' tensor's memory is pinned: then copies to and from a GPU run beside the CPU and at full speed. */
export function isPinned(t: Tensor): boolean {
  return buildInfo().cuda && native().cudaIsPinned({ x: t });
}

/** Path of the cuBLASLt that GEMM uses, or null: then lc's own kernels do. */
export function cublasLt(): string | null {
  return buildInfo().cuda ? native().cublasLtPath() || null : null;
}
