/** Files to raw samples, with the place each came from. Nothing is skipped in silence. */
import { closeSync, fstatSync, openSync, readdirSync, readSync, statSync } from 'node:fs';
import { extname, join } from 'node:path';
import { LcError } from '@lc/tensor';

export type FileType = 'text' | 'jsonl';

/** One line of a JSONL file. */
export interface Line {
  number: number;
  text: string;
}

const CHUNK = 1 << 20;
/** A longer line is not a sample but another format. */
const MAX_LINE_BYTES = 256 << 20;
const MAX_TEXT_BYTES = 512 << 20;

function ioError(path: string, cause: unknown): LcError {
  return new LcError('ERR_LC_DATA', `${path}: ${(cause as Error).message}; check the path`, { cause });
}

function decode(bytes: Uint8Array, path: string, line?: number): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new LcError('ERR_LC_DATA', `${path}${line === undefined ? '' : `:${line}`}: not valid UTF-8; convert the file (iconv -t UTF-8)`, {
      cause,
    });
  }
}

/** Files of a path: itself, or a folder's .txt, .md and .jsonl files by name. @throws ERR_LC_DATA when there are none */
export function listFiles(path: string): string[] {
  let isFolder: boolean;
  try {
    isFolder = statSync(path).isDirectory();
  } catch (cause) {
    throw ioError(path, cause);
  }
  if (!isFolder) return [path];
  const files = readdirSync(path, { withFileTypes: true })
    .filter((entry) => entry.isFile() && /\.(txt|md|jsonl|ndjson)$/i.test(entry.name))
    .map((entry) => join(path, entry.name))
    .sort();
  if (files.length === 0) throw new LcError('ERR_LC_DATA', `${path}: no .txt, .md or .jsonl file in this folder`);
  return files;
}

/** By name: .jsonl and .ndjson are lines of JSON, everything else is text. */
export function typeOfFile(path: string): FileType {
  return /^\.(jsonl|ndjson)$/i.test(extname(path)) ? 'jsonl' : 'text';
}

/** A whole text file. @throws ERR_LC_DATA: unreadable, empty, not UTF-8, or larger than 512 MiB */
export function readText(path: string): string {
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch (cause) {
    throw ioError(path, cause);
  }
  try {
    const { size } = fstatSync(fd);
    if (size > MAX_TEXT_BYTES)
      throw new LcError('ERR_LC_DATA', `${path}: a text file of ${size} bytes; split it into files of at most 512 MiB`);
    const bytes = new Uint8Array(size);
    let at = 0;
    while (at < size) {
      const n = readSync(fd, bytes, at, size - at, null);
      if (n === 0) break;
      at += n;
    }
    const text = decode(bytes.subarray(0, at), path);
    if (text.trim().length === 0) throw new LcError('ERR_LC_DATA', `${path}: the file is empty; remove it from the dataset`);
    return text.charCodeAt(0) === 0xfeff ? text.slice(1) : text;
  } catch (cause) {
    if (cause instanceof LcError) throw cause;
    throw ioError(path, cause);
  } finally {
    closeSync(fd);
  }
}

/** Lines of a file, without holding the file. Blank lines are passed over. */
export function* readLines(path: string): Generator<Line> {
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch (cause) {
    throw ioError(path, cause);
  }
  try {
    const chunk = new Uint8Array(CHUNK);
    let carry: Uint8Array[] = [];
    let carried = 0;
    let number = 0;
    const take = (tail: Uint8Array): Line | undefined => {
      number++;
      const whole = carried > 0 ? Buffer.concat([...carry, tail]) : tail;
      carry = [];
      carried = 0;
      const text = decode(whole, path, number);
      return text.trim() === '' ? undefined : { number, text };
    };
    for (;;) {
      let n: number;
      try {
        n = readSync(fd, chunk, 0, CHUNK, null);
      } catch (cause) {
        throw ioError(path, cause);
      }
      if (n === 0) break;
      let start = 0;
      for (;;) {
        const end = chunk.subarray(0, n).indexOf(10, start);
        if (end < 0) break;
        const line = take(chunk.subarray(start, end));
        if (line) yield line;
        start = end + 1;
      }
      if (start < n) {
        carry.push(chunk.slice(start, n));
        carried += n - start;
        if (carried > MAX_LINE_BYTES)
          throw new LcError('ERR_LC_DATA', `${path}:${number + 1}: a line of more than 256 MiB; is this JSONL (one JSON object a line)?`);
      }
    }
    if (carried > 0) {
      const line = take(new Uint8Array(0));
      if (line) yield line;
    }
  } finally {
    closeSync(fd);
  }
}

/** Parses a line as a JSON object. @throws ERR_LC_DATA with file and line */
export function parseLine(path: string, line: Line): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(line.number === 1 && line.text.charCodeAt(0) === 0xfeff ? line.text.slice(1) : line.text);
  } catch (cause) {
    throw new LcError('ERR_LC_DATA', `${path}:${line.number}: not valid JSON: ${(cause as Error).message}`, { cause });
  }
  if (value === null || typeof value !== 'object' || Array.isArray(value)) {
    throw new LcError(
      'ERR_LC_DATA',
      `${path}:${line.number}: expected a JSON object with "text" or "messages", got ${Array.isArray(value) ? 'an array' : typeof value}`,
    );
  }
  return value as Record<string, unknown>;
}
