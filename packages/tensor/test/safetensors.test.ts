import { execFileSync } from 'node:child_process';
import fs, { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import { empty, fromTypedArray } from '../src/index.js';
import { openSafetensors, openSafetensorsFolder, writeSafetensors } from '../src/safetensors.js';
import { expectNoLeaks, seededRandom } from '../src/testing.js';

expectNoLeaks();
let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'lc-safetensors-'));
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));
afterEach(() => vi.restoreAllMocks());

/** A file from its parts, lying as told. */
function build(name: string, header: string | object, data = 0, claimed?: bigint): string {
  const json = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(claimed ?? BigInt(json.length));
  const path = join(dir, name);
  writeFileSync(path, Buffer.concat([prefix, json, Buffer.alloc(data, 7)]));
  return path;
}
const plain = (name: string, bytes: string | Buffer): string => {
  writeFileSync(join(dir, name), bytes);
  return join(dir, name);
};
const f32 = (shape: unknown, begin: unknown, end: unknown): object => ({ dtype: 'F32', shape, data_offsets: [begin, end] });
const bad = async (path: string, text: RegExp, code = 'ERR_LC_SAFETENSORS'): Promise<void> => {
  const error = await openSafetensors(path).then(
    (file) => {
      file.close();
      return new Error('opened');
    },
    (e: Error & { code?: string }) => e,
  );
  expect(error).toMatchObject({ code, message: expect.stringMatching(text) });
  expect(error.message).toContain(path);
};

describe('round trip', () => {
  it('keeps every dtype, empty and scalar shapes, and metadata, aligned', async () => {
    const path = join(dir, 'all.safetensors');
    using tensor = fromTypedArray(Float32Array.of(1, 2, 3, 4, 5, 6), [2, 3]);
    await writeSafetensors(
      path,
      [
        { name: 'u8', dtype: 'u8', shape: [3], data: Uint8Array.of(1, 2, 3) },
        { name: 'bf16', dtype: 'bf16', shape: [1, 2], data: Uint16Array.of(0x3f80, 0x4000) },
        { name: 'f32', data: tensor },
        { name: 'i64', dtype: 'i64', shape: [1], data: async () => BigInt64Array.of(-5n) },
        { name: 'i32', dtype: 'i32', shape: [], data: Int32Array.of(9) },
        { name: 'none', dtype: 'f16', shape: [0, 4], data: new Uint16Array(0) },
      ],
      { format: 'pt', note: 'é' },
    );
    using file = await openSafetensors(path);
    expect(file.metadata).toEqual({ format: 'pt', note: 'é' });
    expect([...file.names].sort()).toEqual(['bf16', 'f32', 'i32', 'i64', 'none', 'u8']);
    for (const name of file.names) {
      const info = file.info(name);
      expect(
        info.offset %
          Math.max(
            1,
            info.nbytes /
              Math.max(
                1,
                info.shape.reduce((a, b) => a * b, 1),
              ),
          ),
      ).toBe(0);
    }
    expect(await file.read('f32')).toEqual(tensor.data());
    expect(await file.read('u8')).toEqual(Uint8Array.of(1, 2, 3));
    expect(await file.read('bf16')).toEqual(Uint16Array.of(0x3f80, 0x4000));
    expect(await file.read('i64')).toEqual(BigInt64Array.of(-5n));
    expect(await file.read('i32')).toEqual(Int32Array.of(9));
    expect((await file.read('none')).length).toBe(0);
    expect(readdirSync(dir).filter((f) => f.includes('tmp-'))).toEqual([]);

    using same = empty([2, 3], { dtype: 'f32' });
    await file.readInto('f32', same);
    expect(same.data()).toEqual(tensor.data());
    using cast = empty([1, 2], { dtype: 'f32' });
    await file.readInto('bf16', cast);
    expect([...cast.data()]).toEqual([1, 2]);
    using row = empty([1, 3], { dtype: 'f32' });
    await file.readInto('f32', row, { firstRow: 1 });
    expect([...row.data()]).toEqual([4, 5, 6]);
    await expect(file.readInto('f32', row)).rejects.toMatchObject({ code: 'ERR_LC_SHAPE' });
    await expect(file.readInto('f32', row, { firstRow: 2 })).rejects.toMatchObject({ code: 'ERR_LC_SHAPE' });
    await expect(file.read('f33')).rejects.toMatchObject({
      code: 'ERR_LC_SAFETENSORS',
      message: expect.stringContaining("no tensor 'f33'"),
    });
  });

  it('reads what lc has no dtype for as bytes', async () => {
    const path = build(
      'raw.safetensors',
      { a: { dtype: 'F64', shape: [2], data_offsets: [0, 16] }, b: { dtype: 'F8_E8M0', shape: [2], data_offsets: [16, 18] } },
      18,
    );
    using file = await openSafetensors(path);
    expect(file.info('a')).toMatchObject({ fileDtype: 'F64', dtype: 'u8', shape: [2, 8] });
    expect(file.info('b')).toMatchObject({ fileDtype: 'F8_E8M0', dtype: 'u8', shape: [2] });
    expect(await file.read('b')).toEqual(Uint8Array.of(7, 7));
  });

  it('reads across slice borders and converts large tensors', async () => {
    const n = (16 << 20) / 4 + 3;
    const values = Float32Array.from({ length: n }, (_, i) => i % 251);
    const path = join(dir, 'large.safetensors');
    await writeSafetensors(path, [{ name: 'x', dtype: 'f32', shape: [n], data: values }]);
    using file = await openSafetensors(path);
    using half = empty([n], { dtype: 'bf16' });
    await file.readInto('x', half);
    expect(half.data<Uint16Array>()[n - 1]).toBe(new Uint16Array(Float32Array.of((n - 1) % 251).buffer)[1]);
    expect(Buffer.compare(Buffer.from((await file.read('x')).buffer), Buffer.from(values.buffer))).toBe(0);
    rmSync(path);
  });

  it('writes the same bytes for the same tensors in any order', async () => {
    const a = { name: 'a', dtype: 'f32' as const, shape: [1], data: Float32Array.of(1) };
    const b = { name: 'b', dtype: 'u8' as const, shape: [1], data: Uint8Array.of(2) };
    await writeSafetensors(join(dir, 'ab'), [a, b]);
    await writeSafetensors(join(dir, 'ba'), [b, a]);
    expect(readFileSync(join(dir, 'ab'))).toEqual(readFileSync(join(dir, 'ba')));
  });
});

describe('headers that lie', () => {
  it.each<[string, () => string, RegExp]>([
    ['shorter than its length', () => plain('short', 'abc'), /3 bytes, shorter/],
    ['a huge header', () => build('huge', '{}', 0, 1n << 62n), /header of 4611686018427387904 bytes, more than/],
    ['a header past the end', () => build('past', '{}', 0, 4096n), /only 10 bytes in all/],
    ['not JSON', () => build('notjson', '{"a":', 0), /not JSON/],
    ['not UTF-8', () => plain('utf', Buffer.from([3, 0, 0, 0, 0, 0, 0, 0, 0x22, 0xff, 0x22])), /not JSON in UTF-8/],
    ['an array', () => build('array', '[]'), /must be a JSON object/],
    ['a tensor that is no object', () => build('noobj', { a: 3 }), /tensor 'a'.*got 3/],
    ['an unknown dtype', () => build('dtype', { a: { dtype: 'F4', shape: [2], data_offsets: [0, 1] } }, 1), /dtype must be one of/],
    [
      'a dtype from the prototype',
      () => build('proto', { a: { dtype: 'toString', shape: [2], data_offsets: [0, 1] } }, 1),
      /dtype must be one of/,
    ],
    ['a negative size', () => build('negative', { a: f32([-1], 0, 4) }, 4), /shape must be/],
    ['a fractional size', () => build('fraction', { a: f32([1.5], 0, 4) }, 4), /shape must be/],
    ['an overflowing shape', () => build('overflow', { a: f32([2 ** 32, 2 ** 32], 0, 4) }, 4), /overflows/],
    ['offsets that are no pair', () => build('pair', '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', 4), /two whole numbers/],
    ['offsets backwards', () => build('back', { a: f32([1], 8, 4) }, 8), /backwards/],
    ['a size other than shape says', () => build('size', { a: f32([3], 0, 8) }, 8), /needs 12 bytes.*give 8/],
    ['data past the end', () => build('end', { a: f32([3], 0, 12) }, 8), /truncated/],
    ['overlap', () => build('overlap', { a: f32([2], 0, 8), b: f32([2], 4, 12) }, 12), /'b' overlaps tensor 'a'/],
    ['a hole', () => build('hole', { a: f32([1], 0, 4), b: f32([1], 8, 12) }, 12), /4 bytes between tensor 'a' and tensor 'b'/],
    ['a hole at the start', () => build('start', { a: f32([1], 4, 8) }, 8), /4 bytes between the header/],
    ['bytes behind the last tensor', () => build('behind', { a: f32([1], 0, 4) }, 9), /take 4 bytes but the file has 9/],
    [
      'a name twice',
      () =>
        build(
          'twice',
          '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
          1,
        ),
      /'a' twice/,
    ],
    ['a shape twice', () => build('twice2', '{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', 1), /'shape' twice/],
    ['metadata that is no strings', () => build('meta', { __metadata__: { a: 1 } }), /__metadata__/],
  ])('refuses %s', (_, make, text) => bad(make(), text));

  it('refuses folders, missing files and FIFOs without waiting', async () => {
    await bad(dir, /not a regular file/, 'ERR_LC_IO');
    await bad(join(dir, 'nowhere'), /cannot open/, 'ERR_LC_IO');
    const fifo = join(dir, 'fifo');
    execFileSync('mkfifo', [fifo]);
    await bad(fifo, /not a regular file/, 'ERR_LC_IO');
  });

  it('survives random damage: every mutation opens or is a typed error', async () => {
    const path = join(dir, 'fuzz.safetensors');
    await writeSafetensors(path, [
      { name: 'a', dtype: 'f32', shape: [2, 3], data: new Float32Array(6) },
      { name: 'b', dtype: 'u8', shape: [5], data: new Uint8Array(5) },
    ]);
    const good = readFileSync(path);
    const random = seededRandom(7);
    let refused = 0;
    for (let round = 0; round < 400; round++) {
      let bytes = Buffer.from(good);
      if (round % 4 === 0) bytes = bytes.subarray(0, Math.floor(random() * bytes.length));
      else for (let k = 0; k <= round % 3; k++) bytes[Math.floor(random() * (good.length - 29))] = Math.floor(random() * 256);
      writeFileSync(path, bytes);
      try {
        using file = await openSafetensors(path);
        for (const name of file.names) await file.read(name);
      } catch (error) {
        refused++;
        expect(error).toMatchObject({ code: 'ERR_LC_SAFETENSORS' });
      }
    }
    expect(refused).toBeGreaterThan(300);
  });

  it('names the tensor when the file shrinks while it is open', async () => {
    const path = build('shrink', { a: f32([4], 0, 16) }, 16);
    using file = await openSafetensors(path);
    truncateSync(path, fs.statSync(path).size - 5);
    await expect(file.read('a')).rejects.toMatchObject({ code: 'ERR_LC_SAFETENSORS', message: expect.stringContaining("tensor 'a'") });
  });
});

describe('folders', () => {
  const shard = (name: string) => ({ name, dtype: 'u8' as const, shape: [1], data: Uint8Array.of(name.charCodeAt(0)) });
  const folder = async (name: string, index: unknown): Promise<string> => {
    const path = join(dir, name);
    mkdirSync(path, { recursive: true });
    await writeSafetensors(join(path, 'm-1.safetensors'), [shard('a'), shard('b')], { format: 'pt' });
    await writeSafetensors(join(path, 'm-2.safetensors'), [shard('c')]);
    writeFileSync(join(path, 'model.safetensors.index.json'), typeof index === 'string' ? index : JSON.stringify(index));
    return path;
  };
  const good = { a: 'm-1.safetensors', b: 'm-1.safetensors', c: 'm-2.safetensors' };

  it('reads shards, through links too', async () => {
    const path = await folder('shards', { metadata: {}, weight_map: good });
    const linked = join(dir, 'linked');
    symlinkSync(path, linked);
    using reader = await openSafetensorsFolder(linked);
    expect(reader.names).toEqual(['a', 'b', 'c']);
    expect(reader.metadata).toEqual({ format: 'pt' });
    expect(await reader.read('c')).toEqual(Uint8Array.of(99));
  });
  it('reads a single file', async () => {
    const path = join(dir, 'single');
    mkdirSync(path);
    await expect(openSafetensorsFolder(path)).rejects.toMatchObject({
      code: 'ERR_LC_IO',
      message: expect.stringContaining('found: nothing'),
    });
    await writeSafetensors(join(path, 'model.safetensors'), [shard('a')]);
    using reader = await openSafetensorsFolder(path);
    expect(await reader.read('a')).toEqual(Uint8Array.of(97));
  });
  it.each(['../m-1.safetensors', '/etc/x.safetensors', 'sub/m-1.safetensors', '..\\m.safetensors', 'config.json', '', 3])(
    'refuses the shard name %j',
    async (name) => {
      const path = await folder('traversal', { weight_map: { ...good, a: name } });
      await expect(openSafetensorsFolder(path)).rejects.toMatchObject({
        code: 'ERR_LC_SAFETENSORS',
        message: expect.stringContaining("tensor 'a': shard must be"),
      });
    },
  );
  it('lists every disagreement of index and shards', async () => {
    const path = await folder('disagree', {
      weight_map: { a: 'm-1.safetensors', c: 'm-2.safetensors', d: 'm-2.safetensors', e: 'm-1.safetensors' },
    });
    await expect(openSafetensorsFolder(path)).rejects.toMatchObject({
      message: expect.stringMatching(/'d' is not in m-2.*'e' is not in m-1.*'b' is in m-1/),
    });
  });
  it('refuses a broken index and a missing shard', async () => {
    await expect(folder('broken', '{').then(openSafetensorsFolder)).rejects.toMatchObject({ code: 'ERR_LC_SAFETENSORS' });
    await expect(folder('nomap', '[]').then(openSafetensorsFolder)).rejects.toMatchObject({
      message: expect.stringContaining('no weight_map'),
    });
    await expect(
      folder('indextwice', '{"weight_map":{"a":"m-1.safetensors","a":"m-2.safetensors"}}').then(openSafetensorsFolder),
    ).rejects.toMatchObject({ message: expect.stringContaining("'a' twice") });
    await expect(folder('gone', { weight_map: { a: 'm-9.safetensors' } }).then(openSafetensorsFolder)).rejects.toMatchObject({
      code: 'ERR_LC_IO',
    });
  });
});

describe('writing fails cleanly', () => {
  const entry = { name: 'a', dtype: 'u8' as const, shape: [100_000], data: new Uint8Array(100_000) };
  const untouched = async (path: string, write: () => Promise<void>, text: RegExp, code: string): Promise<void> => {
    writeFileSync(path, 'old');
    const before = readdirSync(dir).sort();
    await expect(write()).rejects.toMatchObject({ code, message: expect.stringMatching(text) });
    expect(readFileSync(path, 'utf8')).toBe('old');
    expect(readdirSync(dir).sort()).toEqual(before);
  };

  it('on a full disk (injected ENOSPC after the first write)', async () => {
    const path = join(dir, 'full.safetensors');
    const real = fs.write;
    let calls = 0;
    vi.spyOn(fs, 'write').mockImplementation(((...args: Parameters<typeof fs.write>) => {
      if (calls++ === 0) return real(...args);
      const done = args.at(-1) as unknown as (error: Error) => void;
      done(Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' }));
    }) as typeof fs.write);
    await untouched(path, () => writeSafetensors(path, [entry]), /no space left.*free space/, 'ERR_LC_IO');
    expect(calls).toBe(2);
  });

  it('at a file size limit of the process', async () => {
    const limit = (value: string) => execFileSync('prlimit', ['--pid', String(process.pid), `--fsize=${value}`]);
    const ignore = (): void => {};
    process.on('SIGXFSZ', ignore);
    try {
      limit('50000:unlimited');
      const path = join(dir, 'limit.safetensors');
      await untouched(path, () => writeSafetensors(path, [entry]), /EFBIG.*file size limit/, 'ERR_LC_IO');
    } finally {
      limit('unlimited:unlimited');
      process.off('SIGXFSZ', ignore);
    }
  });

  it('when the data lies or throws', async () => {
    const path = join(dir, 'lies.safetensors');
    const lie = { ...entry, data: () => new Uint8Array(3) };
    await untouched(path, () => writeSafetensors(path, [lie]), /tensor 'a'.*needs 100000 bytes, the data has 3/, 'ERR_LC_SAFETENSORS');
    await untouched(path, () => writeSafetensors(path, [{ ...entry, data: new Uint8Array(3) }]), /needs 100000/, 'ERR_LC_SAFETENSORS');
    await untouched(path, () => writeSafetensors(path, [entry, entry]), /given twice/, 'ERR_LC_SAFETENSORS');
    await untouched(path, () => writeSafetensors(path, [{ ...entry, dtype: 'f8' as 'u8' }]), /expected a dtype/, 'ERR_LC_DTYPE');
  });

  it('into a folder that is not there', async () => {
    await expect(writeSafetensors(join(dir, 'no', 'x'), [entry])).rejects.toMatchObject({ code: 'ERR_LC_IO' });
  });
});
