import fs from 'node:fs';
import { basename, join } from 'node:path';
import type { TypedArray } from '../dtype.js';
import { LcError } from '../errors.js';
import type { Tensor } from '../tensor.js';
import { duplicateKey, maxHeaderBytes, type TensorInfo } from './header.js';
import { missing, openSafetensors, type SafetensorsFile, type SafetensorsReader } from './reader.js';

/** A Hugging Face folder: all shards of an index, or one file. Close it, or use `using`. */
export class SafetensorsFolder implements SafetensorsReader {
  readonly names: readonly string[];

  /** @internal Use `openSafetensorsFolder`. */
  constructor(
    readonly path: string,
    readonly metadata: Readonly<Record<string, string>>,
    /** Open files by name. */
    private readonly files: readonly SafetensorsFile[],
    private readonly fileOf: ReadonlyMap<string, SafetensorsFile>,
  ) {
    this.names = Object.freeze([...fileOf.keys()]);
  }

  /** Whether a file of the folder holds the tensor. */
  has(name: string): boolean {
    return this.fileOf.has(name);
  }
  info(name: string): TensorInfo {
    return this.file(name).info(name);
  }
  read<T extends TypedArray = TypedArray>(name: string): Promise<T> {
    return this.file(name).read<T>(name);
  }
  readInto(name: string, target: Tensor, options?: { firstRow?: number }): Promise<void> {
    return this.file(name).readInto(name, target, options);
  }
  /** Closes all files. */
  close(): void {
    for (const file of this.files) file.close();
  }
  /** For `using`: `close()`. */
  [Symbol.dispose](): void {
    this.close();
  }

  private file(name: string): SafetensorsFile {
    const file = this.fileOf.get(name);
    if (!file) throw missing(this.path, name, this.names);
    return file;
  }
}

/**
 * Opens `model.safetensors.index.json` with all its shards, or else `model.safetensors`. Shards must lie in the folder itself; the index and the shards
 * must agree on every tensor. @throws ERR_LC_SAFETENSORS (one error that lists all disagreements), ERR_LC_IO
 */
export async function openSafetensorsFolder(dir: string): Promise<SafetensorsFolder> {
  const index = join(dir, 'model.safetensors.index.json');
  if (fs.existsSync(index)) return openShards(dir, index);
  const single = join(dir, 'model.safetensors');
  if (!fs.existsSync(single)) {
    const seen = fs.existsSync(dir) ? fs.readdirSync(dir).slice(0, 10).join(', ') || 'nothing' : 'no such folder';
    throw new LcError(
      'ERR_LC_IO',
      `${dir}: expected model.safetensors or model.safetensors.index.json, found: ${seen}; pass a Hugging Face model folder (convert .bin files to safetensors first)`,
    );
  }
  const file = await openSafetensors(single);
  return new SafetensorsFolder(dir, file.metadata, [file], new Map(file.names.map((name) => [name, file])));
}

async function openShards(dir: string, index: string): Promise<SafetensorsFolder> {
  const weightMap = readIndex(index);
  const files = new Map<string, SafetensorsFile>();
  try {
    for (const shard of new Set(weightMap.values())) files.set(shard, await openSafetensors(join(dir, shard)));
    const fileOf = new Map<string, SafetensorsFile>();
    const problems: string[] = [];
    for (const [name, shard] of weightMap) {
      const file = files.get(shard) as SafetensorsFile;
      if (file.has(name)) fileOf.set(name, file);
      else problems.push(`'${name}' is not in ${shard}`);
    }
    for (const [shard, file] of files) {
      for (const name of file.names)
        if (weightMap.get(name) !== shard) problems.push(`'${name}' is in ${shard} but the index does not say so`);
    }
    if (problems.length > 0) {
      throw new LcError(
        'ERR_LC_SAFETENSORS',
        `${index}: does not match its shards: ${problems.join('; ')}; download the folder again as a whole`,
      );
    }
    const metadata = Object.assign({}, ...[...files.values()].map((file) => file.metadata)) as Record<string, string>;
    return new SafetensorsFolder(dir, metadata, [...files.values()], fileOf);
  } catch (error) {
    for (const file of files.values()) file.close();
    throw error;
  }
}

function readIndex(index: string): Map<string, string> {
  const fail = (problem: string, cause?: unknown): never => {
    throw new LcError('ERR_LC_SAFETENSORS', `${index}: ${problem}; download it again`, { cause });
  };
  const size = fs.statSync(index).size;
  if (size > maxHeaderBytes) return fail(`has ${size} bytes, more than the ${maxHeaderBytes} allowed`);
  let json: unknown;
  let text: string;
  try {
    text = fs.readFileSync(index, 'utf8');
    json = JSON.parse(text);
  } catch (cause) {
    return fail(`is not JSON (${(cause as Error).message})`, cause);
  }
  const twice = duplicateKey(text);
  if (twice !== undefined) return fail(`names '${twice}' twice`);
  const map = (json as { weight_map?: unknown } | null)?.weight_map;
  if (typeof map !== 'object' || map === null || Array.isArray(map)) return fail('has no weight_map object');
  const out = new Map<string, string>();
  for (const [name, shard] of Object.entries(map)) {
    // A shard name is a file name, never a path: an index from elsewhere must not reach outside its folder.
    if (typeof shard !== 'string' || shard !== basename(shard) || /[\\/\0]/.test(shard) || !shard.endsWith('.safetensors')) {
      return fail(`tensor '${name}': shard must be the name of a .safetensors file in the same folder, got ${JSON.stringify(shard)}`);
    }
    out.set(name, shard);
  }
  return out;
}
