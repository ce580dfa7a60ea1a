/** Atomic files and folders: a reader sees the old state or the new one, never a half. */
import { closeSync, existsSync, fsyncSync, mkdirSync, openSync, readFileSync, renameSync, rmSync, writeSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { LcError } from '@lc/tensor';

function ioError(what: string, cause: unknown): LcError {
  const code = (cause as NodeJS.ErrnoException).code ?? 'unknown';
  const hint =
    code === 'ENOSPC' || code === 'EFBIG' || code === 'EDQUOT'
      ? 'free disk space or choose another output folder'
      : 'check the path and its permissions';
  return new LcError('ERR_LC_IO', `${what}: ${(cause as Error).message}; what was there before is untouched; ${hint}`, { cause });
}

function fsyncFolder(folder: string): void {
  const fd = openSync(folder, 'r');
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

/** Writes a whole file: temporary name, fsync, rename. @throws ERR_LC_IO */
export function writeFileAtomic(path: string, content: string | Uint8Array): void {
  const temporary = join(dirname(path), `.${basename(path)}.${process.pid}.tmp`);
  try {
    mkdirSync(dirname(path), { recursive: true });
    const fd = openSync(temporary, 'w');
    try {
      const bytes = typeof content === 'string' ? Buffer.from(content) : content;
      let written = 0;
      while (written < bytes.length) written += writeSync(fd, bytes, written);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    renameSync(temporary, path);
    fsyncFolder(dirname(path));
  } catch (cause) {
    rmSync(temporary, { force: true });
    throw ioError(`writing ${path}`, cause);
  }
}

/** The last file written into a finished folder. */
export const completeMarker = 'COMPLETE';

/**
 * Fills a folder under a temporary name, writes the marker last, then renames it into place. An older folder of that name is replaced only then.
 * When `fill` throws, the temporary folder is removed and nothing else changes.
 */
export async function writeFolderAtomic(folder: string, fill: (temporary: string) => Promise<void>): Promise<void> {
  const temporary = join(dirname(folder), `.${basename(folder)}.${process.pid}.tmp`);
  const old = `${temporary}.old`;
  try {
    rmSync(temporary, { recursive: true, force: true });
    mkdirSync(temporary, { recursive: true });
    await fill(temporary);
    writeFileAtomic(join(temporary, completeMarker), '');
    if (existsSync(folder)) renameSync(folder, old);
    renameSync(temporary, folder);
    fsyncFolder(dirname(folder));
    rmSync(old, { recursive: true, force: true });
  } catch (cause) {
    if (!existsSync(folder) && existsSync(old)) renameSync(old, folder);
    rmSync(temporary, { recursive: true, force: true });
    if (cause instanceof LcError) throw cause;
    throw ioError(`writing ${folder}`, cause);
  }
}

/** Whether a folder was written to its end. */
export function isComplete(folder: string): boolean {
  return existsSync(join(folder, completeMarker));
}

/** Reads a JSON file of at most `limit` bytes. @throws ERR_LC_IO, ERR_LC_DATA */
export function readJson(path: string, limit = 64 << 20): unknown {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (cause) {
    throw new LcError('ERR_LC_IO', `reading ${path}: ${(cause as Error).message}`, { cause });
  }
  if (text.length > limit) throw new LcError('ERR_LC_DATA', `${path}: larger than ${limit} bytes; is this the right file?`);
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new LcError('ERR_LC_DATA', `${path}: not valid JSON: ${(cause as Error).message}`, { cause });
  }
}
