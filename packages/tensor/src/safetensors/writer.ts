import fs from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { type DType, dtypeBytes, type TypedArray } from '../dtype.js';
import { LcError, LcTypeError } from '../errors.js';
import { Tensor } from '../tensor.js';
import { fileDtypeOf, maxHeaderBytes } from './header.js';

/** One tensor to write. `data` may be a function, called when its turn comes, so that not all data need be in memory at once. */
export interface SafetensorsEntry {
  readonly name: string;
  /** Default: the tensor's own. Required for typed arrays of bf16 and f16 bits. */
  readonly dtype?: DType;
  /** Default: the tensor's own. */
  readonly shape?: readonly number[];
  /** The values, or a function that makes them when their turn comes. */
  readonly data: Tensor | TypedArray | (() => Tensor | TypedArray | Promise<Tensor | TypedArray>);
}

const SLICE = 16 << 20;
let counter = 0;

/** A chunk sink that reports what it was writing to when the disk refuses. */
type Write = (bytes: Uint8Array) => Promise<void>;

/**
 * Writes a file as a whole or not at all: into a temporary file in the same folder, fsync, rename over `path`. When anything fails (a full disk, an
 * exception of `body`) the temporary file is removed and an older file at `path` is untouched.
 * @throws ERR_LC_IO for errors of the file system; whatever `body` throws
 */
export async function atomicWriteFile(path: string, body: string | Uint8Array | ((write: Write) => Promise<void>)): Promise<void> {
  const temporary = join(dirname(path), `.${basename(path)}.tmp-${process.pid}-${counter++}`);
  let fd = -1;
  try {
    fd = await io(path, () => fs.openSync(temporary, 'wx', 0o666));
    const write: Write = async (bytes) => {
      for (let done = 0; done < bytes.length; ) {
        const count = Math.min(SLICE, bytes.length - done);
        done += await io(path, () => writeSome(fd, bytes, done, count));
      }
    };
    if (typeof body === 'function') await body(write);
    else await write(typeof body === 'string' ? new TextEncoder().encode(body) : body);
    await io(path, () => promisify(fs.fsync)(fd));
    const closing = fd;
    fd = -1;
    await io(path, () => fs.closeSync(closing)); // network file systems report a full disk here
    await io(path, () => fs.renameSync(temporary, path));
    syncFolder(dirname(path));
  } catch (error) {
    if (fd >= 0) fs.closeSync(fd);
    fs.rmSync(temporary, { force: true });
    throw error;
  }
}

function writeSome(fd: number, bytes: Uint8Array, offset: number, length: number): Promise<number> {
  return new Promise((resolve, reject) => {
    fs.write(fd, bytes, offset, length, null, (error, written) => (error ? reject(error) : resolve(written)));
  });
}

async function io<T>(path: string, fn: () => T | Promise<T>): Promise<T> {
  try {
    return await fn();
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code;
    const next =
      code === 'ENOSPC' || code === 'EDQUOT' || code === 'EFBIG'
        ? 'free space there (or raise the file size limit) and write again'
        : 'check the folder and its permissions';
    throw new LcError('ERR_LC_IO', `${path}: writing failed: ${(cause as Error).message}; nothing was changed: ${next}`, { cause });
  }
}

/** So that the rename survives a power cut. Some file systems cannot sync a folder; the file's own data is safe by then. */
function syncFolder(dir: string): void {
  try {
    const fd = fs.openSync(dir, 'r');
    try {
      fs.fsyncSync(fd);
    } finally {
      fs.closeSync(fd);
    }
  } catch {
    // best effort
  }
}

/**
 * Writes a safetensors file, streaming and atomically (see `atomicWriteFile`). Tensors are laid out by falling element size, then by name, so that each is
 * aligned; the same tensors give the same bytes.
 * @param metadata strings only, e.g. `{ format: 'pt' }`
 * @throws ERR_LC_IO, ERR_LC_SAFETENSORS (duplicate names, wrong sizes), ERR_LC_DTYPE
 */
export async function writeSafetensors(
  path: string,
  tensors: Iterable<SafetensorsEntry>,
  metadata: Record<string, string> = {},
): Promise<void> {
  const entries = [...tensors].map((entry) => describe(path, entry));
  entries.sort((a, b) => dtypeBytes[b.dtype] - dtypeBytes[a.dtype] || (a.name < b.name ? -1 : 1));
  // Object.fromEntries, not assignment: a tensor named '__proto__' stays an ordinary key.
  const header: [string, unknown][] = Object.keys(metadata).length > 0 ? [['__metadata__', metadata]] : [];
  const seen = new Set(['__metadata__']);
  let offset = 0;
  for (const { name, dtype, shape, nbytes } of entries) {
    if (seen.has(name))
      throw new LcError('ERR_LC_SAFETENSORS', `${path}: tensor name '${name}' is given twice or reserved; name tensors uniquely`);
    seen.add(name);
    header.push([name, { dtype: fileDtypeOf[dtype], shape, data_offsets: [offset, offset + nbytes] }]);
    offset += nbytes;
  }
  const json = new TextEncoder().encode(JSON.stringify(Object.fromEntries(header)));
  const padded = Math.ceil(json.length / 8) * 8;
  if (padded > maxHeaderBytes)
    throw new LcError('ERR_LC_SAFETENSORS', `${path}: a header of ${padded} bytes is above the ${maxHeaderBytes} allowed; write shards`);
  await atomicWriteFile(path, async (write) => {
    const head = new Uint8Array(8 + padded).fill(0x20);
    new DataView(head.buffer).setBigUint64(0, BigInt(padded), true);
    head.set(json, 8);
    await write(head);
    for (const entry of entries) {
      const given = typeof entry.data === 'function' ? await entry.data() : entry.data;
      const array =
        given instanceof Tensor
          ? given.device.startsWith('cuda') || !given.isContiguous
            ? await given.read<TypedArray>()
            : given.data<TypedArray>()
          : given;
      if (array.byteLength !== entry.nbytes) throw sizeError(path, entry, array.byteLength);
      await write(new Uint8Array(array.buffer, array.byteOffset, array.byteLength));
    }
  });
}

interface Described {
  name: string;
  dtype: DType;
  shape: readonly number[];
  nbytes: number;
  data: SafetensorsEntry['data'];
}

function describe(path: string, entry: SafetensorsEntry): Described {
  const { name, data } = entry;
  const tensor = data instanceof Tensor ? data : undefined;
  const dtype = entry.dtype ?? tensor?.dtype;
  const shape = entry.shape ?? tensor?.shape;
  if (!dtype || !(dtype in dtypeBytes))
    throw new LcTypeError(
      'ERR_LC_DTYPE',
      `${path}: tensor '${name}': expected a dtype (${Object.keys(dtypeBytes).join(', ')}), got ${dtype}`,
    );
  if (!shape?.every((size) => Number.isSafeInteger(size) && size >= 0))
    throw new LcTypeError('ERR_LC_SHAPE', `${path}: tensor '${name}': expected a shape, got ${shape}`);
  const nbytes = shape.reduce((a, b) => a * b, dtypeBytes[dtype]);
  const described = { name, dtype, shape, nbytes, data };
  if (typeof data !== 'function') {
    const bytes = tensor ? tensor.nbytes : (data as TypedArray).byteLength;
    if (bytes !== nbytes) throw sizeError(path, described, bytes);
  }
  return described;
}

function sizeError(path: string, entry: Described, bytes: number): LcError {
  return new LcError(
    'ERR_LC_SAFETENSORS',
    `${path}: tensor '${entry.name}': ${entry.dtype}[${entry.shape.join(',')}] needs ${entry.nbytes} bytes, the data has ${bytes}; fix shape or dtype`,
  );
}
