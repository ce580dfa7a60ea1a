import type { DType } from '../dtype.js';
import { LcError } from '../errors.js';

/** Headers above this are refused, as the reference implementation does (100 MB there; real ones are far below 25 MB). */
export const maxHeaderBytes = 25_000_000;

/** Names of dtypes in the file format, with the bytes of one element. Formats below one byte (F4, F6) are not supported. */
const itemBytes = {
  F64: 8,
  F32: 4,
  F16: 2,
  BF16: 2,
  I64: 8,
  I32: 4,
  I16: 2,
  I8: 1,
  U64: 8,
  U32: 4,
  U16: 2,
  U8: 1,
  BOOL: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
  F8_E8M0: 1,
} as const;
/** Element types of the file format, as its header spells them. */
export type SafetensorsDType = keyof typeof itemBytes;

const lcDtype: Partial<Record<SafetensorsDType, DType>> = { F32: 'f32', F16: 'f16', BF16: 'bf16', I32: 'i32', I64: 'i64', U8: 'u8' };
export const fileDtypeOf: Record<DType, SafetensorsDType> = { f32: 'F32', bf16: 'BF16', f16: 'F16', i32: 'I32', i64: 'I64', u8: 'U8' };

/** One tensor of a file. */
export interface TensorInfo {
  readonly name: string;
  /** As the file names it, e.g. `BF16`. */
  readonly fileDtype: SafetensorsDType;
  /** How it is read. Types that lc has no dtype for are read as raw bytes, `u8`. */
  readonly dtype: DType;
  /** Sizes; raw types wider than a byte have one more dimension, their bytes: F64 [3] is u8 [3, 8]. */
  readonly shape: readonly number[];
  readonly nbytes: number;
  readonly file: string;
  /** Of its first byte, from the start of the file. */
  readonly offset: number;
}

export interface Header {
  readonly metadata: Readonly<Record<string, string>>;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
}

export function safetensorsError(file: string, problem: string, cause?: unknown): LcError {
  const hint = 'the file is damaged or was not written by a safetensors library: download or write it again';
  return new LcError('ERR_LC_SAFETENSORS', `${file}: ${problem}; ${hint}`, cause === undefined ? undefined : { cause });
}

const isRecord = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null && !Array.isArray(value);
const isSize = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;
const short = (value: unknown): string => {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
};

/** The first key that occurs twice in one object of a valid JSON text (JSON.parse keeps the last and says nothing), or undefined. */
export function duplicateKey(text: string): string | undefined {
  const open: (Set<string> | null)[] = []; // null: an array
  for (let i = 0; i < text.length; i++) {
    const c = text.charCodeAt(i);
    if (c === 0x7b) open.push(new Set());
    else if (c === 0x5b) open.push(null);
    else if (c === 0x7d || c === 0x5d) open.pop();
    else if (c === 0x22) {
      const start = i++;
      while (text.charCodeAt(i) !== 0x22) i += text.charCodeAt(i) === 0x5c ? 2 : 1;
      let next = i + 1;
      while (/\s/.test(text.charAt(next))) next++;
      const keys = open.at(-1);
      if (keys && text[next] === ':') {
        const key = JSON.parse(text.slice(start, i + 1)) as string;
        if (keys.has(key)) return key;
        keys.add(key);
      }
    }
  }
  return undefined;
}

/**
 * Parses and checks a header. `file` names it in errors; `dataStart` is where the data begins; `fileBytes` is the size of the whole file.
 * @throws ERR_LC_SAFETENSORS
 */
export function parseHeader(bytes: Uint8Array, file: string, dataStart: number, fileBytes: number): Header {
  let text: string;
  let json: unknown;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(bytes);
    json = JSON.parse(text);
  } catch (cause) {
    throw safetensorsError(file, `the header is not JSON in UTF-8 (${(cause as Error).message})`, cause);
  }
  if (!isRecord(json)) throw safetensorsError(file, `the header must be a JSON object, got ${short(json)}`);
  const twice = duplicateKey(text);
  if (twice !== undefined) throw safetensorsError(file, `the header names '${twice}' twice`);

  const metadata: Record<string, string> = {};
  const tensors = new Map<string, TensorInfo>();
  for (const [name, entry] of Object.entries(json)) {
    if (name === '__metadata__') {
      if (!isRecord(entry) || Object.values(entry).some((v) => typeof v !== 'string'))
        throw safetensorsError(file, '__metadata__ must map strings to strings');
      Object.assign(metadata, entry);
    } else {
      tensors.set(name, parseEntry(name, entry, file, dataStart, fileBytes));
    }
  }

  // Together the tensors must cover the data exactly: no overlap, no hole, nothing behind the last.
  const dataBytes = fileBytes - dataStart;
  let end = dataStart;
  let previous = 'the header';
  for (const info of [...tensors.values()].sort((a, b) => a.offset - b.offset || a.nbytes - b.nbytes)) {
    if (info.offset < end) throw safetensorsError(file, `tensor '${info.name}' overlaps ${previous}`);
    if (info.offset > end)
      throw safetensorsError(file, `${info.offset - end} bytes between ${previous} and tensor '${info.name}' belong to no tensor`);
    end = info.offset + info.nbytes;
    previous = `tensor '${info.name}'`;
  }
  if (end !== fileBytes)
    throw safetensorsError(file, `the tensors take ${end - dataStart} bytes but the file has ${dataBytes} bytes of data`);
  return { metadata, tensors };
}

function parseEntry(name: string, entry: unknown, file: string, dataStart: number, fileBytes: number): TensorInfo {
  const fail = (problem: string): never => {
    throw safetensorsError(file, `tensor '${name}': ${problem}`);
  };
  if (!isRecord(entry)) return fail(`expected { dtype, shape, data_offsets }, got ${short(entry)}`);
  const { dtype, shape, data_offsets: offsets } = entry;
  if (typeof dtype !== 'string' || !Object.hasOwn(itemBytes, dtype)) {
    return fail(`dtype must be one of ${Object.keys(itemBytes).join(', ')}, got ${short(dtype)}`);
  }
  const fileDtype = dtype as SafetensorsDType;
  if (!Array.isArray(shape) || !shape.every(isSize)) return fail(`shape must be an array of whole numbers, got ${short(shape)}`);
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isSize))
    return fail(`data_offsets must be two whole numbers, got ${short(offsets)}`);
  const [begin, end] = offsets as [number, number];
  let want: number = itemBytes[fileDtype];
  for (const size of shape as number[]) want *= size;
  if (!Number.isSafeInteger(want)) return fail(`shape ${short(shape)} overflows`);
  const dataBytes = fileBytes - dataStart;
  if (end < begin) return fail(`data_offsets ${short(offsets)} run backwards`);
  if (end > dataBytes) return fail(`ends at byte ${end} of the data, but the file has only ${dataBytes} bytes of it (truncated?)`);
  if (end - begin !== want)
    return fail(`${fileDtype}${short(shape)} needs ${want} bytes, data_offsets ${short(offsets)} give ${end - begin}`);
  const known = lcDtype[fileDtype];
  const bytes = itemBytes[fileDtype];
  const sizes = known || bytes === 1 ? (shape as number[]) : [...(shape as number[]), bytes];
  return Object.freeze({
    name,
    fileDtype,
    dtype: known ?? 'u8',
    shape: Object.freeze(sizes),
    nbytes: want,
    file,
    offset: dataStart + begin,
  });
}
