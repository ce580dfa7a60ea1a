import { fill } from './copy.js';
import { defaultStream, type Stream } from './cuda.js';
import { type Device, type DeviceLike, type DType, dtypeBytes, parseDevice } from './dtype.js';
import { LcError, LcTypeError } from './errors.js';
import { empty, type Tensor } from './tensor.js';

const ALIGN = 256;
const MIN_SLAB = 1 << 20;
const roundUp = (bytes: number): number => Math.ceil(bytes / ALIGN) * ALIGN;

/** A position to come back to: everything taken after it is given back by `reset`. */
export interface Mark {
  readonly slab: number;
  readonly offset: number;
  readonly used: number;
}

/** Where a workspace lies, how large it is and whether it may grow. */
export interface WorkspaceOptions {
  /** Default 'cpu'. */
  device?: DeviceLike;
  /** Reserved up front. */
  bytes?: number;
  label?: string;
  /** Never grow: running out is an error. A planned step uses this. */
  fixed?: boolean;
  /** dtype of activations; default f32 on the CPU, bf16 on CUDA. */
  dtype?: DType;
  /** The compute stream; default the device's default stream. */
  stream?: Stream;
  /** Told when it grows beyond `bytes`: then whoever planned it was wrong. */
  onGrow?: (grown: { bytes: number; capacity: number; what: string }) => void;
}

/**
 * A stack of temporaries: `mark()`, `alloc()` ..., `reset(mark)`. Nothing is freed one by one and nothing is initialised. Memory is used on the
 * compute stream alone, so a reset needs no wait. Unless `fixed`, it grows by slabs while a first step shows how much is needed, and becomes one slab
 * of that size when it is next empty; from then on the same step allocates nothing.
 */
export class Workspace implements Disposable {
  readonly device: Device;
  /** dtype of activations. */
  readonly dtype: DType;
  private readonly fixed: boolean;
  private readonly label: string;
  private readonly givenStream: Stream | undefined;
  private readonly onGrow: WorkspaceOptions['onGrow'];
  private slabs: Tensor[] = [];
  private slab = 0;
  private offset = 0;
  private used = 0;
  private peak = 0;
  private closed = false;

  constructor(options: WorkspaceOptions = {}) {
    this.device = parseDevice(options.device ?? 'cpu').device;
    this.dtype = options.dtype ?? (this.device.startsWith('cuda') ? 'bf16' : 'f32');
    this.fixed = options.fixed ?? false;
    this.label = options.label ?? 'workspace';
    this.givenStream = options.stream;
    this.onGrow = options.onGrow;
    if (options.bytes) this.reserve(options.bytes);
  }

  /** The stream that everything taken from here is used on. */
  get stream(): Stream {
    return this.givenStream ?? defaultStream(this.device);
  }
  /** Bytes in use now. */
  get usedBytes(): number {
    return this.used;
  }
  /** The most that was ever in use at once. */
  get peakBytes(): number {
    return this.peak;
  }
  /** Bytes that are held, in use or not. */
  get capacity(): number {
    return this.slabs.reduce((sum, slab) => sum + slab.nbytes, 0);
  }

  /** Makes room for `bytes` in one piece. Only while empty. @throws ERR_LC_OUT_OF_MEMORY, and ERR_LC_ARGUMENT while in use */
  reserve(bytes: number): void {
    if (this.used > 0)
      throw new LcTypeError('ERR_LC_ARGUMENT', `workspace '${this.label}': reserve needs an empty workspace; reset it first`);
    if (this.slabs.length === 1 && this.capacity >= bytes) return;
    this.free();
    this.slabs = [empty([roundUp(bytes)], { dtype: 'u8', device: this.device, label: this.label })];
  }

  /** Uninitialised, 256-byte aligned, valid until a `reset` to an earlier mark. @throws ERR_LC_OUT_OF_MEMORY when fixed and full */
  alloc(shape: readonly number[], dtype: DType = this.dtype): Tensor {
    if (this.closed) throw new LcTypeError('ERR_LC_DISPOSED', `workspace '${this.label}' was disposed`);
    let count = 1;
    for (const size of shape) count *= size;
    const bytes = roundUp(count * dtypeBytes[dtype]);
    if (!(bytes >= 0)) throw new LcTypeError('ERR_LC_SHAPE', `workspace '${this.label}': bad shape [${shape.join(',')}]`);
    let slab = this.slabs[this.slab];
    while (!slab || this.offset + bytes > slab.nbytes) {
      if (slab && this.slab + 1 < this.slabs.length) {
        this.slab++;
      } else {
        this.grow(bytes, shape, dtype);
        this.slab = this.slabs.length - 1;
      }
      this.offset = 0;
      slab = this.slabs[this.slab];
    }
    const out = slab.slice(0, this.offset, bytes).reinterpret(dtype, shape);
    this.offset += bytes;
    this.used += bytes;
    if (this.used > this.peak) this.peak = this.used;
    return out;
  }

  /** As `alloc`, all zeros. */
  zeros(shape: readonly number[], dtype: DType = this.dtype): Tensor {
    const t = this.alloc(shape, dtype);
    fill(t, 0);
    return t;
  }

  /** A position to come back to with `reset`. */
  mark(): Mark {
    return { slab: this.slab, offset: this.offset, used: this.used };
  }

  /** Gives back everything taken since `mark` (or everything). */
  reset(mark: Mark = { slab: 0, offset: 0, used: 0 }): void {
    this.slab = mark.slab;
    this.offset = mark.offset;
    this.used = mark.used;
    if (this.used === 0 && this.slabs.length > 1 && !this.closed) {
      this.reserve(this.peak); // one slab of what was needed: the next round allocates nothing
      this.slab = 0;
      this.offset = 0;
    }
  }

  /** Runs `fn` and gives back what it took, also when it throws. `fn` must be synchronous. */
  scoped<T>(fn: () => T): T {
    const mark = this.mark();
    try {
      return fn();
    } finally {
      this.reset(mark);
    }
  }

  /** Gives the memory back. Tensors of it can no longer be used. */
  dispose(): void {
    this.closed = true;
    this.free();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  private grow(bytes: number, shape: readonly number[], dtype: DType): void {
    if (this.fixed) {
      throw new LcError(
        'ERR_LC_OUT_OF_MEMORY',
        `workspace '${this.label}' on ${this.device}: ${dtype}[${shape.join(',')}] needs ${bytes} bytes, ` +
          `${this.capacity - this.used} of ${this.capacity} are left; plan a larger workspace or smaller chunks`,
      );
    }
    const size = Math.max(bytes, roundUp(this.capacity / 4), MIN_SLAB);
    this.slabs.push(empty([size], { dtype: 'u8', device: this.device, label: this.label }));
    this.onGrow?.({ bytes: size, capacity: this.capacity, what: `${dtype}[${shape.join(',')}]` });
  }

  private free(): void {
    for (const slab of this.slabs) slab.dispose();
    this.slabs = [];
    this.slab = 0;
    this.offset = 0;
    this.used = 0;
  }
}
