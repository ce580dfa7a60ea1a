import fs from 'node:fs';
import { promisify } from 'node:util';
import { copy } from '../copy.js';
import { defaultStream } from '../cuda.js';
import { arrayOver, dtypeBytes, type TypedArray } from '../dtype.js';
import { LcError, LcTypeError } from '../errors.js';
import { empty, type Tensor } from '../tensor.js';
import { maxHeaderBytes, parseHeader, safetensorsError, type TensorInfo } from './header.js';

/** Bytes read at a time. */
const SLICE = 16 << 20;
const fsRead = promisify(fs.read) as (
  fd: number,
  buffer: Uint8Array,
  offset: number,
  length: number,
  position: number,
) => Promise<{ bytesRead: number }>;

/** Tensors by name, from one file or a folder of shards. */
export interface SafetensorsReader extends Disposable {
  /** For messages: the file or folder. */
  readonly path: string;
  readonly metadata: Readonly<Record<string, string>>;
  /** In the order of the file's header (of a folder: of its index). */
  readonly names: readonly string[];
  /** Whether the tensor is there. */
  has(name: string): boolean;
  /** @throws ERR_LC_SAFETENSORS when there is no such tensor */
  info(name: string): TensorInfo;
  /** The tensor in a fresh typed array (bf16 and f16 as Uint16Array bits, raw types as Uint8Array). */
  read<T extends TypedArray = TypedArray>(name: string): Promise<T>;
  /**
   * Reads a tensor, slice by slice, into a contiguous tensor of the same shape on any device, or rows `firstRow` .. `firstRow + target.shape[0]` of it.
   * Another floating dtype is converted to. @throws ERR_LC_SAFETENSORS, ERR_LC_SHAPE, ERR_LC_STRIDES, ERR_LC_IO
   */
  readInto(name: string, target: Tensor, options?: { firstRow?: number }): Promise<void>;
  /** Closes the file; what was read stays. */
  close(): void;
}

/** One open file. Close it, or use `using`. */
export class SafetensorsFile implements SafetensorsReader {
  private closed = false;
  readonly names: readonly string[];

  /** @internal Use `openSafetensors`. */
  constructor(
    readonly path: string,
    private readonly fd: number,
    readonly metadata: Readonly<Record<string, string>>,
    private readonly tensors: ReadonlyMap<string, TensorInfo>,
  ) {
    this.names = Object.freeze([...tensors.keys()]);
  }

  /** Whether the tensor is there. */
  has(name: string): boolean {
    return this.tensors.has(name);
  }

  info(name: string): TensorInfo {
    const info = this.tensors.get(name);
    if (!info) throw missing(this.path, name, this.names);
    return info;
  }

  async read<T extends TypedArray = TypedArray>(name: string): Promise<T> {
    const info = this.info(name);
    const bytes = new Uint8Array(info.nbytes);
    await this.fill(info, bytes, info.offset);
    return arrayOver(info.dtype, bytes.buffer, 0, info.nbytes / dtypeBytes[info.dtype]) as T;
  }

  async readInto(name: string, target: Tensor, options: { firstRow?: number } = {}): Promise<void> {
    const info = this.info(name);
    if (!target.isContiguous) throw new LcTypeError('ERR_LC_STRIDES', `readInto: '${name}' needs a contiguous target, got ${target}`);
    const item = dtypeBytes[info.dtype];
    const start = rowOffset(info, target, options.firstRow);
    const flat = target.view([target.numel]);
    const onCpu = !target.device.startsWith('cuda');
    if (onCpu && target.dtype === info.dtype) {
      const data = flat.data<TypedArray>();
      await this.fill(info, new Uint8Array(data.buffer, data.byteOffset, data.byteLength), info.offset + start * item);
      return;
    }
    using staging = empty([Math.min(flat.numel, SLICE / item)], {
      dtype: info.dtype,
      device: onCpu ? 'cpu' : 'host',
      label: 'safetensors',
    });
    for (let done = 0; done < flat.numel; done += staging.numel) {
      const count = Math.min(staging.numel, flat.numel - done);
      const data = staging.data<TypedArray>();
      await this.fill(info, new Uint8Array(data.buffer, data.byteOffset, count * item), info.offset + (start + done) * item);
      copy(flat.rows(done, count), staging.rows(0, count));
      if (!onCpu) await defaultStream(target.device).sync(); // before the staging buffer is filled again
    }
  }

  /** Closes the file; what was read stays. */
  close(): void {
    if (this.closed) return;
    this.closed = true;
    fs.closeSync(this.fd);
  }
  /** For `using`: `close()`. */
  [Symbol.dispose](): void {
    this.close();
  }

  private async fill(info: TensorInfo, bytes: Uint8Array, position: number): Promise<void> {
    if (this.closed) throw new LcTypeError('ERR_LC_DISPOSED', `${this.path}: was closed; read '${info.name}' before closing it`);
    await readFully(this.fd, this.path, bytes, position, `tensor '${info.name}'`);
  }
}

export function missing(path: string, name: string, names: readonly string[]): LcError {
  const near = names.filter((n) => n.endsWith(name.slice(name.lastIndexOf('.'))) || n.includes(name)).slice(0, 3);
  const some = near.length > 0 ? near : names.slice(0, 3);
  const hint = some.length > 0 ? `it holds ${names.length} tensors, e.g. '${some.join("', '")}'` : 'it holds no tensors';
  return new LcError('ERR_LC_SAFETENSORS', `${path}: no tensor '${name}'; ${hint}: check the name and that this is the right file`);
}

/** Element offset of the target's first row, after checking that the target fits. */
function rowOffset(info: TensorInfo, target: Tensor, firstRow: number | undefined): number {
  const same = (a: readonly number[], b: readonly number[]): boolean => a.length === b.length && a.every((size, i) => size === b[i]);
  const have = `'${info.name}' is ${info.fileDtype}[${info.shape.join(',')}] in ${info.file}`;
  if (firstRow === undefined) {
    if (!same(info.shape, target.shape))
      throw new LcTypeError('ERR_LC_SHAPE', `readInto: ${have}, the target is ${target}; pass one of that shape`);
    return 0;
  }
  const rows = info.shape[0] ?? -1;
  const end = firstRow + (target.shape[0] ?? 0);
  if (!Number.isInteger(firstRow) || firstRow < 0 || end > rows || !same(info.shape.slice(1), target.shape.slice(1))) {
    throw new LcTypeError(
      'ERR_LC_SHAPE',
      `readInto: rows ${firstRow}..${end} do not fit: ${have}, the target is ${target}; only the first size may differ`,
    );
  }
  return firstRow * info.shape.slice(1).reduce((a, b) => a * b, 1);
}

async function readFully(fd: number, path: string, bytes: Uint8Array, position: number, what: string): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    let bytesRead: number;
    try {
      ({ bytesRead } = await fsRead(fd, bytes, done, Math.min(SLICE, bytes.length - done), position + done));
    } catch (cause) {
      throw new LcError('ERR_LC_IO', `${path}: reading ${what} failed: ${(cause as Error).message}; check the disk or network mount`, {
        cause,
      });
    }
    if (bytesRead === 0) throw safetensorsError(path, `ends inside ${what} (truncated while it was open?)`);
    done += bytesRead;
  }
}

/**
 * Opens a file and checks its whole header: size at most 25 MB, valid JSON without duplicate keys, known dtypes, sizes that match the offsets, and
 * tensors that cover the file's data exactly, without overlap. @throws ERR_LC_SAFETENSORS, ERR_LC_IO
 */
export async function openSafetensors(path: string): Promise<SafetensorsFile> {
  let fd: number;
  let size: number;
  try {
    const stat = fs.statSync(path); // before open: opening a FIFO would wait
    if (!stat.isFile()) throw new Error('not a regular file');
    fd = fs.openSync(path, 'r');
    size = fs.fstatSync(fd).size;
  } catch (cause) {
    throw new LcError('ERR_LC_IO', `${path}: cannot open: ${(cause as Error).message}; check the path and its permissions`, { cause });
  }
  try {
    if (size < 8) throw safetensorsError(path, `has ${size} bytes, shorter than the 8 of a header's length`);
    const prefix = new Uint8Array(8);
    await readFully(fd, path, prefix, 0, 'the header length');
    const length = new DataView(prefix.buffer).getBigUint64(0, true);
    if (length > BigInt(maxHeaderBytes))
      throw safetensorsError(path, `claims a header of ${length} bytes, more than the ${maxHeaderBytes} allowed`);
    if (8n + length > BigInt(size))
      throw safetensorsError(path, `claims a header of ${length} bytes but has only ${size} bytes in all (truncated?)`);
    const header = new Uint8Array(Number(length));
    await readFully(fd, path, header, 8, 'the header');
    const { metadata, tensors } = parseHeader(header, path, 8 + header.length, size);
    return new SafetensorsFile(path, fd, metadata, tensors);
  } catch (error) {
    fs.closeSync(fd);
    throw error;
  }
}
