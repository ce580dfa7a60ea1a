import { constants } from 'node:buffer';
import {
  arrayOver,
  type Device,
  type DeviceLike,
  type DType,
  deviceOfCode,
  dtypeBytes,
  dtypeCode,
  dtypeOfArray,
  dtypeOfCode,
  parseDevice,
  type TypedArray,
} from './dtype.js';
import { LcError, LcTypeError } from './errors.js';
import { trackLeak, untrackLeak } from './leaks.js';
import { core, type Handle, type Loan } from './native.js';

/**
 * Says no when a tensor is sent to another thread: structured cloning reads every enumerable property in order, so this one comes first. V8's own words for
 * what it meets further on ("#<Object> could not be cloned") name neither the tensor nor what to do.
 */
abstract class ThreadBound {
  abstract readonly label: string;
  constructor() {
    Object.defineProperty(this, 'noCrossing', noCrossing);
  }
}
const noCrossing: PropertyDescriptor = {
  enumerable: true,
  get(this: ThreadBound): never {
    throw new LcTypeError(
      'ERR_LC_THREAD',
      `tensor '${this.label}' cannot be cloned or sent to another thread: its handle belongs to the thread that made it. Send the values ` +
        '(await tensor.read(), and fromTypedArray there) or, for the same memory, the address dlpackPointer(toDLPack(tensor)), and fromDLPack there',
    );
  },
};

/** One allocation, shared by a tensor and its views. */
class Storage extends ThreadBound {
  disposed = false;
  /** The ArrayBuffer given out over this memory; detached on dispose, so that a stale typed array is empty, not dangling. */
  loan: Loan | null = null;

  constructor(
    readonly handle: Handle,
    readonly nbytes: number,
    readonly device: Device,
    readonly label: string,
  ) {
    super();
  }
}

const product = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);
const packedStrides = (shape: readonly number[]): number[] => {
  const strides = new Array<number>(shape.length);
  let stride = 1;
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= shape[i] as number;
  }
  return strides;
};

/** What a new tensor is made of, and where. */
export interface EmptyOptions {
  /** Default 'f32'. */
  dtype?: DType;
  /** Default 'cpu'. */
  device?: DeviceLike;
  /** Counted under this name in `memory()`. */
  label?: string;
}

/**
 * An n-dimensional array (at most 6 dimensions) on a device: an allocation, or a view of one. Views share the allocation's lifetime.
 *
 * Tensors are disposed explicitly: `dispose()`, `using`, or a `Scope`. Using one afterwards throws `ERR_LC_DISPOSED`.
 */
export class Tensor implements Disposable {
  /** What native code reads: [byteOffset, dtype code, ndim, ...shape, ...strides]. */
  private metaCache: Float64Array | undefined;

  /** @internal Use `empty`, `zeros`, `fromTypedArray`, `fromPointer` or `fromDLPack`. */
  constructor(
    private readonly storage: Storage,
    readonly dtype: DType,
    readonly shape: readonly number[],
    /** In elements. */
    readonly strides: readonly number[],
    /** From the start of the allocation. */
    readonly byteOffset: number,
    private readonly isView: boolean,
  ) {}

  /** What native code takes: a tagged external over the allocation. @throws ERR_LC_DISPOSED */
  get handle(): Handle {
    return this.storage.handle;
  }
  /** For native code: byte offset, dtype code, rank, shape, strides (in elements). */
  get meta(): Float64Array {
    this.metaCache ??= Float64Array.of(this.byteOffset, dtypeCode[this.dtype], this.shape.length, ...this.shape, ...this.strides);
    return this.metaCache;
  }
  /** Where the memory lies. */
  get device(): Device {
    return this.storage.device;
  }
  /** What the allocation is counted under. */
  get label(): string {
    return this.storage.label;
  }
  /** Whether the memory was given back, here or through another view of it. */
  get disposed(): boolean {
    return this.storage.disposed;
  }
  /** Number of elements. */
  get numel(): number {
    return product(this.shape);
  }
  /** Bytes of the elements (of a strided view: without the gaps). */
  get nbytes(): number {
    return this.numel * dtypeBytes[this.dtype];
  }
  /** Whether elements lie row-major without gaps. */
  get isContiguous(): boolean {
    const packed = packedStrides(this.shape);
    return this.shape.every((size, i) => size <= 1 || this.strides[i] === packed[i]) || this.numel === 0;
  }
  /** e.g. `f32[4096,192] on cpu ('checkpoints')`, for error messages. */
  toString(): string {
    return `${this.dtype}[${this.shape.join(',')}] on ${this.device} ('${this.label}')`;
  }

  /** As `toString`: what a log of an object that holds tensors says. */
  toJSON(): string {
    return this.toString();
  }

  /** Rows start .. start+count of the first dimension, as a view. */
  rows(start: number, count: number): Tensor {
    return this.slice(0, start, count);
  }

  /** Elements start .. start+count of one dimension, as a (strided) view. @throws ERR_LC_OUT_OF_BOUNDS */
  slice(dim: number, start: number, count: number): Tensor {
    const size = this.shape[dim];
    if (size === undefined) throw new LcTypeError('ERR_LC_SHAPE', `slice: ${this} has no dimension ${dim}`);
    if (!Number.isInteger(start) || !Number.isInteger(count) || start < 0 || count < 0 || start + count > size) {
      throw new LcTypeError('ERR_LC_OUT_OF_BOUNDS', `slice: ${start}..${start + count} is outside dimension ${dim} of ${this}`);
    }
    const shape = this.shape.slice();
    shape[dim] = count;
    const offset = this.byteOffset + start * (this.strides[dim] as number) * dtypeBytes[this.dtype];
    return new Tensor(this.storage, this.dtype, shape, this.strides, offset, true);
  }

  /**
   * Another shape over the same elements; one size may be -1. The trailing dimensions of a tensor whose rows are strided can be reshaped too,
   * as long as the first size stays: `[n, h*d]` (a column slice) to `[n, h, d]`.
   * @throws ERR_LC_SHAPE, ERR_LC_STRIDES
   */
  view(shape: readonly number[]): Tensor {
    const unknown = shape.indexOf(-1);
    const rest = product(shape.filter((size) => size !== -1));
    const full = unknown < 0 ? shape : shape.map((size) => (size === -1 ? this.numel / rest : size));
    if (product(full) !== this.numel || full.some((size) => !Number.isInteger(size) || size < 0)) {
      throw new LcTypeError('ERR_LC_SHAPE', `view: [${shape.join(',')}] does not have the ${this.numel} elements of ${this}`);
    }
    const strides = packedStrides(full);
    if (!this.isContiguous) {
      const inner = this.shape.slice(1);
      const innerPacked = packedStrides(inner);
      const rowsPacked = inner.every((size, i) => size <= 1 || this.strides[i + 1] === innerPacked[i]);
      if (!rowsPacked || full[0] !== this.shape[0])
        throw new LcTypeError('ERR_LC_STRIDES', `view: ${this} is strided; copy it to a contiguous tensor first`);
      strides[0] = this.strides[0] as number;
    }
    return new Tensor(this.storage, this.dtype, full, strides, this.byteOffset, true);
  }

  /** The same bytes as another dtype of the same size, or of bytes: `u8` storage of 4-bit codes, for instance. Contiguous tensors only. */
  reinterpret(dtype: DType, shape: readonly number[]): Tensor {
    if (!this.isContiguous || product(shape) * dtypeBytes[dtype] > this.nbytes || this.byteOffset % dtypeBytes[dtype] !== 0) {
      throw new LcTypeError('ERR_LC_SHAPE', `reinterpret: ${dtype}[${shape.join(',')}] does not fit into ${this}`);
    }
    return new Tensor(this.storage, dtype, shape, packedStrides(shape), this.byteOffset, true);
  }

  /**
   * The elements as a typed array that shares this memory (CPU and host, contiguous; bf16 and f16 as Uint16Array bits). Valid until the tensor is
   * disposed; then it becomes empty.
   * @throws ERR_LC_DEVICE, ERR_LC_STRIDES, ERR_LC_DISPOSED; ERR_LC_OUT_OF_BOUNDS where the allocation is larger than JavaScript can look into (4 GiB in Node 20)
   */
  data(): Float32Array;
  data<T extends TypedArray>(): T;
  data<T extends TypedArray>(): T {
    this.check('data');
    if (this.device.startsWith('cuda'))
      throw new LcTypeError('ERR_LC_DEVICE', `data: ${this} is not in CPU memory; use await tensor.read()`);
    if (!this.isContiguous)
      throw new LcTypeError('ERR_LC_STRIDES', `data: ${this} is strided; copy it to a contiguous tensor, or use await tensor.read()`);
    const s = this.storage;
    if (s.nbytes > constants.MAX_LENGTH) {
      throw new LcTypeError(
        'ERR_LC_OUT_OF_BOUNDS',
        `data: ${this} lies in an allocation of ${(s.nbytes / 2 ** 30).toFixed(2)} GiB, and a typed array of this Node looks into at most ` +
          `${(constants.MAX_LENGTH / 2 ** 30).toFixed(2)} GiB; copy a part of it, such as rows(start, count), to a tensor of its own and look there`,
      );
    }
    s.loan ??= core().buffer(s.handle);
    return arrayOver(this.dtype, s.loan.buffer, this.byteOffset, this.numel) as T;
  }

  /** A copy of the elements, from any device and any strides, in a new typed array. */
  async read(): Promise<Float32Array>;
  async read<T extends TypedArray>(): Promise<T>;
  async read<T extends TypedArray>(): Promise<T> {
    this.check('read');
    const { copy } = await import('./copy.js');
    const { defaultStream } = await import('./cuda.js');
    using out = empty(this.shape, { dtype: this.dtype, device: this.device.startsWith('cuda') ? 'host' : 'cpu', label: 'read' });
    copy(out, this);
    if (this.device.startsWith('cuda')) await defaultStream(this.device).sync();
    return out.data<T>().slice() as T;
  }

  /** Frees the allocation (stream-ordered on CUDA). Idempotent; on a view it does nothing. */
  dispose(): void {
    const s = this.storage;
    if (this.isView || s.disposed) return;
    s.disposed = true;
    untrackLeak(s);
    if (s.loan) core().detach(s.loan.buffer, s.loan.loan);
    s.loan = null;
    core().dispose(s.handle);
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  private check(op: string): void {
    if (this.storage.disposed)
      throw new LcTypeError('ERR_LC_DISPOSED', `${op}: ${this} was disposed; keep it alive until the last use (see Scope.move)`);
  }
}

function fresh(
  handle: Handle,
  dtype: DType,
  shape: readonly number[],
  strides: readonly number[],
  nbytes: number,
  device: Device,
  label: string,
): Tensor {
  const storage = new Storage(handle, nbytes, device, label);
  const tensor = new Tensor(storage, dtype, Object.freeze(shape.slice()), Object.freeze(strides.slice()), 0, false);
  trackLeak(storage, label, nbytes);
  return tensor;
}

function allocate(shape: readonly number[], options: EmptyOptions, zero: boolean): Tensor {
  const { dtype = 'f32', label = 'unlabelled' } = options;
  if (!(dtype in dtypeCode))
    throw new LcTypeError('ERR_LC_DTYPE', `empty: dtype must be one of ${dtypeOfCode.join(', ')}, got ${String(dtype)}`);
  const { device, type, id } = parseDevice(options.device ?? 'cpu');
  const handle = core().alloc(dtypeCode[dtype], shape, type, id, zero, label);
  return fresh(handle, dtype, shape, packedStrides(shape), product(shape) * dtypeBytes[dtype], device, label);
}

/** Uninitialised memory. @throws ERR_LC_SHAPE, ERR_LC_OUT_OF_MEMORY, and for cuda ERR_LC_NO_DRIVER and its kin. */
export function empty(shape: readonly number[], options: EmptyOptions = {}): Tensor {
  return allocate(shape, options, false);
}

/** As `empty`, all zeros. */
export function zeros(shape: readonly number[], options: EmptyOptions = {}): Tensor {
  return allocate(shape, options, true);
}

/** Same shape, dtype and device as `t` unless said otherwise. */
export function emptyLike(t: Tensor, options: EmptyOptions = {}): Tensor {
  return empty(t.shape, { dtype: t.dtype, device: t.device, label: t.label, ...options });
}

/**
 * A CPU tensor over a typed array's own memory: no copy. The array stays alive as long as the tensor; do not transfer its buffer away.
 *
 * @param options.dtype for a Uint16Array: 'bf16' or 'f16'.
 */
export function fromTypedArray(array: TypedArray, shape: readonly number[], options: { dtype?: DType; label?: string } = {}): Tensor {
  const dtype = options.dtype ?? dtypeOfArray(array);
  const label = options.label ?? 'typed array';
  if (!dtype || !ArrayBuffer.isView(array)) {
    throw new LcTypeError(
      'ERR_LC_DTYPE',
      'fromTypedArray: expected a Float32Array, Int32Array, BigInt64Array or Uint8Array, or a Uint16Array with dtype bf16 or f16',
    );
  }
  if (array.BYTES_PER_ELEMENT !== dtypeBytes[dtype]) {
    throw new LcTypeError(
      'ERR_LC_DTYPE',
      `fromTypedArray: ${dtype} has ${dtypeBytes[dtype]} bytes per element, the array ${array.BYTES_PER_ELEMENT}`,
    );
  }
  if (product(shape) !== array.length) {
    throw new LcTypeError(
      'ERR_LC_SHAPE',
      `fromTypedArray: shape [${shape.join(',')}] needs ${product(shape)} elements, the array has ${array.length}`,
    );
  }
  const handle = core().fromTypedArray(array, dtypeCode[dtype], shape, label);
  const t = fresh(handle, dtype, shape, packedStrides(shape), array.byteLength, 'cpu', label);
  return t;
}

/** Memory of other native code, as a tensor: `fromPointer`. */
export interface PointerOptions {
  /** Address of the first element; the memory must stay valid until `release`. */
  ptr: bigint;
  device: DeviceLike;
  shape: readonly number[];
  dtype: DType;
  /** Called once, on this thread's event loop, when lc holds the memory no longer. */
  release?: () => void;
  label?: string;
}

/** A tensor over memory that other native code owns. Nothing can check the address: a wrong one crashes the process. */
export function fromPointer(options: PointerOptions): Tensor {
  const { ptr, shape, dtype, release, label = 'pointer' } = options;
  const { device, type, id } = parseDevice(options.device);
  if (!(dtype in dtypeCode))
    throw new LcTypeError('ERR_LC_DTYPE', `fromPointer: dtype must be one of ${dtypeOfCode.join(', ')}, got ${String(dtype)}`);
  const nbytes = product(shape) * dtypeBytes[dtype];
  const handle = core().fromPointer(ptr, nbytes, type, id, dtypeCode[dtype], shape, label, release);
  return fresh(handle, dtype, shape, packedStrides(shape), nbytes, device, label);
}

/** Address of a tensor's first element, for other native code; valid while the tensor lives. */
export function pointerOf(t: Tensor): bigint {
  return core().pointer(t.handle) + BigInt(t.byteOffset);
}

/**
 * Exports as DLPack 1.x: an external that holds a `DLManagedTensorVersioned`. It keeps the memory alive, also after `t.dispose()`, until it is consumed
 * and released, or collected. For a consumer that wants an address, `dlpackPointer(external)` gives it up, once.
 */
export function toDLPack(t: Tensor): object {
  return core().toDLPack({ x: t });
}

/**
 * Address of the `DLManagedTensorVersioned`; whoever takes it must call its deleter. The external is empty afterwards. The address may be taken by another
 * thread (`fromDLPack` there): both then use one memory, and the last to dispose frees it. Memory that `fromTypedArray` borrowed goes with its own thread.
 */
export function dlpackPointer(external: object): bigint {
  return core().dlpackPointer(external);
}

/** Imports a DLPack 1.x tensor without a copy: from `toDLPack`, or from the address of a `DLManagedTensorVersioned` (ownership moves here). */
export function fromDLPack(source: object | bigint, options: { label?: string } = {}): Tensor {
  const label = options.label ?? 'dlpack';
  const d = core().fromDLPack(source, label);
  const dtype = dtypeOfCode[d.dtype];
  if (!dtype) throw new LcError('ERR_LC_DTYPE', `fromDLPack: unknown dtype code ${d.dtype}`);
  const extent = product(d.shape) === 0 ? 0 : d.shape.reduce((sum, size, i) => sum + (size - 1) * (d.strides[i] as number), 1);
  return fresh(d.handle, dtype, d.shape, d.strides, extent * dtypeBytes[dtype], deviceOfCode(d.deviceType, d.deviceId), label);
}
