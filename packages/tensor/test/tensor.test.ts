import { constants } from 'node:buffer';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import {
  copy,
  deviceMemory,
  dlpackPointer,
  empty,
  fill,
  fromDLPack,
  fromPointer,
  fromTypedArray,
  memInfo,
  pointerOf,
  processMemory,
  Scope,
  setRamLimit,
  setVramLimit,
  type Tensor,
  toDLPack,
  zeros,
} from '../src/index.js';
import { expectNoLeaks } from '../src/testing.js';

expectNoLeaks();
const code = (fn: () => unknown): string => {
  try {
    fn();
  } catch (error) {
    return (error as { code: string }).code;
  }
  return 'nothing thrown';
};

describe('Tensor', () => {
  it('shares memory with the typed array it was made from', () => {
    const array = Float32Array.from({ length: 6 }, (_, i) => i);
    using t = fromTypedArray(array, [2, 3]);
    t.data()[4] = 42;
    expect(array[4]).toBe(42);
    array[0] = 7;
    expect(Array.from(t.rows(0, 1).data())).toEqual([7, 1, 2]);
  });

  it('views share storage and know their strides', () => {
    using t = zeros([4, 6]);
    for (let i = 0; i < 24; i++) t.data()[i] = i;
    const column = t.slice(1, 2, 3);
    expect([column.shape, column.strides, column.isContiguous, column.byteOffset]).toEqual([[4, 3], [6, 1], false, 8]);
    expect(code(() => column.data())).toBe('ERR_LC_STRIDES');
    expect(column.view([4, 3, 1]).strides).toEqual([6, 1, 1]);
    expect(code(() => column.view([3, 4]))).toBe('ERR_LC_STRIDES');
    expect(t.view([-1, 12]).shape).toEqual([2, 12]);
    using packed = empty([4, 3]);
    copy(packed, column);
    expect(Array.from(packed.data())).toEqual([2, 3, 4, 8, 9, 10, 14, 15, 16, 20, 21, 22]);
  });

  it.each([
    ['a negative size', () => empty([-1]), 'ERR_LC_SHAPE'],
    ['a fractional size', () => empty([1.5]), 'ERR_LC_SHAPE'],
    ['too many bytes', () => empty([2 ** 40, 2 ** 40]), 'ERR_LC_SHAPE'],
    ['more than the machine has', () => empty([2 ** 44], { dtype: 'u8' }), 'ERR_LC_OUT_OF_MEMORY'],
    ['seven dimensions', () => empty([1, 1, 1, 1, 1, 1, 1]), 'ERR_LC_SHAPE'],
    ['an unknown dtype', () => empty([1], { dtype: 'f64' as 'f32' }), 'ERR_LC_DTYPE'],
    ['an unknown device', () => empty([1], { device: 'tpu' as 'cpu' }), 'ERR_LC_DEVICE'],
    ['a shape that does not match', () => fromTypedArray(new Float32Array(5), [2, 3]), 'ERR_LC_SHAPE'],
    ['a Float64Array', () => fromTypedArray(new Float64Array(4) as unknown as Float32Array, [4]), 'ERR_LC_DTYPE'],
  ])('refuses %s', (_, fn, want) => {
    expect(code(fn)).toBe(want);
  });

  it('refuses to be used after dispose, also through a view or a stale array', () => {
    const t = zeros([8], { label: 'gone' });
    const view = t.rows(0, 4);
    const stale = t.data();
    t.dispose();
    t.dispose();
    expect(stale.length).toBe(0);
    for (const op of [() => view.data(), () => fill(view, 1), () => t.data()]) expect(code(op)).toBe('ERR_LC_DISPOSED');
    expect(() => fill(view, 1)).toThrow(/gone/);
  });

  it('checks views natively: a forged meta cannot leave the allocation', () => {
    using t = zeros([8]);
    const forged = { handle: t.handle, meta: Float64Array.of(0, 0, 1, 9, 1), label: 'forged' } as unknown as Tensor;
    expect(code(() => fill(forged, 1))).toBe('ERR_LC_OUT_OF_BOUNDS');
    for (const meta of [
      Float64Array.of(0, 0, 1, -1, 1),
      Float64Array.of(0, 9, 1, 1, 1),
      Float64Array.of(Number.NaN, 0, 1, 1, 1),
      Float64Array.of(0, 0, 3),
    ]) {
      expect(code(() => fill({ ...forged, handle: t.handle, meta } as unknown as Tensor, 1))).toBe('ERR_LC_NOT_A_TENSOR');
    }
    for (const other of [{}, 5, null, { handle: {}, meta: new Float64Array(5) }]) {
      expect(code(() => fill(other as unknown as Tensor, 1))).toMatch(/ERR_LC_NOT_A_TENSOR|undefined/);
    }
    expect(() => structuredClone(t.handle)).toThrow();
  });

  it('counts live and peak bytes per device and label', () => {
    const before = deviceMemory('cpu');
    const a = empty([1000], { label: 'counted' });
    const b = empty([500], { label: 'counted', dtype: 'u8' });
    const host = empty([10], { device: 'host', label: 'counted' });
    let now = deviceMemory('cpu');
    expect(now.byLabel.counted).toMatchObject({ liveBytes: 4500, peakBytes: 4500, liveTensors: 2 });
    expect(now.liveBytes - before.liveBytes).toBe(4500);
    expect(deviceMemory('host').byLabel.counted?.liveBytes).toBe(40);
    a.dispose();
    b.dispose();
    host.dispose();
    now = deviceMemory('cpu');
    expect(now.byLabel.counted).toMatchObject({ liveBytes: 0, peakBytes: 4500, liveTensors: 0, allocations: 2 });
  });

  it('10,000 create/dispose cycles leave nothing live', () => {
    const before = deviceMemory('cpu').liveBytes;
    for (let i = 0; i < 10_000; i++) empty([256, 256]).dispose();
    expect(deviceMemory('cpu').liveBytes).toBe(before);
  });

  it('knows free memory', () => {
    const m = memInfo('cpu');
    expect(m.freeBytes).toBeGreaterThan(0);
    expect(m.totalBytes).toBeGreaterThanOrEqual(m.freeBytes);
  });
});

describe('foreign memory', () => {
  it('wraps a pointer and calls release once', async () => {
    using owner = zeros([4]);
    let released = 0;
    const t = fromPointer({ ptr: pointerOf(owner), device: 'cpu', shape: [2, 2], dtype: 'f32', release: () => released++ });
    fill(t, 3);
    expect(Array.from(owner.data())).toEqual([3, 3, 3, 3]);
    t.dispose();
    await sleep(20);
    expect(released).toBe(1);
  });

  it('DLPack goes out and comes back without a copy, and outlives its source', async () => {
    const source = zeros([3, 4], { label: 'exported' });
    source.data().set(Array.from({ length: 12 }, (_, i) => i));
    const external = toDLPack(source.slice(1, 1, 2));
    source.dispose();
    using back = fromDLPack(external);
    expect([back.shape, back.strides, back.dtype]).toEqual([[3, 2], [4, 1], 'f32']);
    using packed = empty([3, 2]);
    copy(packed, back);
    expect(Array.from(packed.data())).toEqual([1, 2, 5, 6, 9, 10]);
    expect(deviceMemory('cpu').byLabel.exported?.liveTensors).toBe(1);
    expect(code(() => fromDLPack(external))).toBe('ERR_LC_DISPOSED');
    expect(code(() => fromDLPack({}))).toBe('ERR_LC_NOT_A_TENSOR');
  });

  it('moves a DLPack tensor by address', () => {
    using source = zeros([2], { dtype: 'i32' });
    using back = fromDLPack(dlpackPointer(toDLPack(source)));
    expect(back.dtype).toBe('i32');
    expect(pointerOf(back)).toBe(pointerOf(source));
  });
});

describe('Scope', () => {
  it('disposes in reverse order, also when one throws, and lets results go', () => {
    const order: string[] = [];
    const item = (name: string, fails = false) => ({
      [Symbol.dispose]() {
        order.push(name);
        if (fails) throw new Error(name);
      },
    });
    const scope = new Scope();
    scope.own(item('a'));
    scope.own(item('b', true));
    const kept = scope.own(item('kept'));
    scope.own(item('c'));
    scope.move(kept);
    expect(() => scope.dispose()).toThrow('b');
    expect(order).toEqual(['c', 'b', 'a']);
  });
});

describe('limits', () => {
  it('setRamLimit: an allocation beyond it fails and names it; memInfo counts within it', () => {
    const { liveBytes } = deviceMemory('cpu');
    const host = deviceMemory('host').liveBytes;
    const room = 1 << 20;
    setRamLimit(liveBytes + host + room);
    try {
      expect(memInfo('cpu')).toMatchObject({ freeBytes: room, totalBytes: liveBytes + host + room });
      expect(processMemory()).toMatchObject({ limitBytes: liveBytes + host + room, source: 'kernel' });
      using half = empty([room / 2], { dtype: 'u8', device: 'host' });
      expect(memInfo('host').freeBytes).toBe(room - half.nbytes);
      expect(() => empty([room], { dtype: 'u8', label: 'too much' })).toThrow(
        expect.objectContaining({
          code: 'ERR_LC_OUT_OF_MEMORY',
          message: expect.stringMatching(/'too much' failed on host RAM, whose limit is .*ramLimit/),
        }),
      );
    } finally {
      setRamLimit(null);
    }
    empty([room], { dtype: 'u8' }).dispose();
    expect(processMemory().limitBytes).toBeNull();
    expect(processMemory().peakBytes).toBeGreaterThan(1 << 20);
  });

  it('refuses what is no limit, and a VRAM limit for something else', () => {
    for (const bad of [0, -1, 1.5, Number.NaN]) expect(code(() => setRamLimit(bad))).toBe('ERR_LC_ARGUMENT');
    expect(code(() => setVramLimit('cpu', 1))).toBe('ERR_LC_DEVICE');
    expect(['ERR_LC_NO_DRIVER', 'ERR_LC_NO_PREBUILD', 'nothing thrown']).toContain(code(() => setVramLimit('cuda', null)));
    expect(['ERR_LC_NO_DRIVER', 'ERR_LC_NO_PREBUILD', 'nothing thrown']).toContain(code(() => processMemory('cuda')));
  });
});

// Linux maps the pages when they are touched, so this takes none.
it.skipIf(memInfo('cpu').freeBytes < 5 * 2 ** 30 || constants.MAX_LENGTH > 2 ** 32)('data() of more than 4 GiB says what to do', () => {
  using t = empty([4 * 2 ** 30 + 256], { dtype: 'u8' });
  expect(() => t.data()).toThrow(
    expect.objectContaining({ code: 'ERR_LC_OUT_OF_BOUNDS', message: expect.stringContaining('rows(start, count)') }),
  );
  expect(code(() => t.rows(0, 16).data())).toBe('ERR_LC_OUT_OF_BOUNDS');
});
