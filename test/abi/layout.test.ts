/**
 * The C layout between addons is frozen: each ABI version's layout is recorded in layouts/<version>.txt and never edited afterwards, as NumPy locks its
 * C API by version and hash. A change to abi.h that moves, drops or retypes anything fails here; an appended field asks for a new minor version.
 */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';

const here = dirname(fileURLToPath(import.meta.url));
const include = join(here, '../../native/include');
const recorded = join(here, 'layouts');

/** SHA-256 of every recorded layout. Versions are added, never changed. */
const LOCKED: Record<string, string> = {
  '1.0': 'cef0988c21adbb1915f507e412a041e82974cfadf0494ca0a23fdf399f647f8c',
  '1.1': 'b83f4a34663ac148057cf88d25f4813b4ddf6ccfc523a9428b8ba831ea306167',
};

interface Field {
  name: string;
  declaration: string;
}

/** Structs of a header, with each field's declaration as it is written. */
function structs(header: string): Map<string, Field[]> {
  const text = readFileSync(join(include, header), 'utf8')
    .replace(/\/\*[\s\S]*?\*\/|\/\/.*$/gm, '')
    .replace(/\s+/g, ' ');
  const found = new Map<string, Field[]>();
  for (const [, body, name] of text.matchAll(/typedef struct \w* ?\{([^}]*)\} (\w+);/g)) {
    const fields: Field[] = [];
    for (const statement of (body as string).split(';').map((s) => s.trim())) {
      if (!statement) continue;
      const pointer = /\(\*(\w+)\)/.exec(statement);
      if (pointer) fields.push({ name: pointer[1] as string, declaration: statement });
      else {
        const [first, ...more] = statement.split(',').map((s) => s.trim()) as [string, ...string[]];
        const type = first.replace(/ ?\w+$/, '');
        for (const n of [first.slice(type.length).trim(), ...more]) fields.push({ name: n, declaration: `${type} ${n}` });
      }
    }
    found.set(name as string, fields);
  }
  return found;
}

/** Compiled as C, by the compiler that builds addons: constants, sizes, and every field's offset. */
function currentLayout(): { version: string; lines: string[] } {
  const all = new Map([...structs('lctx/dlpack.h'), ...structs('lctx/abi.h')]);
  const header = readFileSync(join(include, 'lctx/abi.h'), 'utf8');
  const constants = [...header.matchAll(/^#define (LCTX_\w+) /gm)]
    .map((m) => m[1] as string)
    .filter((name) => !/_(MAJOR|MINOR)$/.test(name));
  const dtypes = [...(/typedef enum \{([^}]*)\} lctx_dtype/.exec(header)?.[1] ?? '').matchAll(/LCTX_\w+/g)].map((m) => m[0]);
  const body = [...constants, ...dtypes].map((name) => `printf("${name} %#llx\\n", (unsigned long long)${name});`);
  for (const [struct, fields] of all) {
    body.push(`printf("sizeof ${struct} %zu\\n", sizeof(${struct}));`);
    for (const { name, declaration } of fields) body.push(`printf("${struct} %zu ${declaration}\\n", offsetof(${struct}, ${name}));`);
  }
  for (const [callback] of header.matchAll(/^typedef \w+ \(\*\w+\)\([^)]*\);/gm))
    body.push(`puts(${JSON.stringify(callback.replace(/\s+/g, ' '))});`);
  const source = `#include <stdio.h>\n#include "lctx/abi.h"\nint main(void) { printf("%u.%u\\n", LCTX_ABI_MAJOR, LCTX_ABI_MINOR);\n${body.join('\n')}\nreturn 0; }\n`;
  const folder = mkdtempSync(join(tmpdir(), 'lc-layout-'));
  try {
    writeFileSync(join(folder, 'layout.c'), source);
    const compiler = process.env.CXX ?? 'g++';
    execFileSync(compiler, [
      '-x',
      'c',
      '-std=c11',
      '-Wall',
      '-Werror',
      '-I',
      include,
      '-o',
      join(folder, 'layout'),
      join(folder, 'layout.c'),
    ]);
    const [version, ...lines] = execFileSync(join(folder, 'layout'), { encoding: 'utf8' }).trim().split('\n') as [string, ...string[]];
    return { version, lines };
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

const current = currentLayout();

it("this version's layout is the recorded one", () => {
  const file = join(recorded, `${current.version}.txt`);
  if (process.env.LCTX_RECORD_LAYOUT === '1' && !existsSync(file)) writeFileSync(file, `${current.lines.join('\n')}\n`);
  expect(
    existsSync(file),
    `record the layout of ABI ${current.version}: LCTX_RECORD_LAYOUT=1 npx vitest run abi/layout, and add its hash here`,
  ).toBe(true);
  expect(
    current.lines,
    `the C ABI changed, but still calls itself ${current.version}. Fields appended at the end of a struct with struct_size: raise LCTX_ABI_MINOR; ` +
      'anything else: raise LCTX_ABI_MAJOR. Never edit a recorded layout.',
  ).toEqual(readFileSync(file, 'utf8').trim().split('\n'));
});

it('no recorded layout was edited', () => {
  const hashes = Object.fromEntries(
    readdirSync(recorded).map((file) => [
      file.replace('.txt', ''),
      createHash('sha256')
        .update(readFileSync(join(recorded, file)))
        .digest('hex'),
    ]),
  );
  expect(hashes).toEqual(LOCKED);
});

it('earlier minor versions are contained in it', () => {
  const [major, minor] = current.version.split('.').map(Number) as [number, number];
  const files = readdirSync(recorded);
  for (let earlier = 0; earlier < minor; earlier++) {
    const file = `${major}.${earlier}.txt`;
    expect(files, `the layout of ${major}.${earlier} must stay recorded`).toContain(file);
    const lines = readFileSync(join(recorded, file), 'utf8').trim().split('\n');
    expect(current.lines).toEqual(expect.arrayContaining(lines.filter((line) => !line.startsWith('sizeof'))));
  }
});

it('what every version, also a future major, can read stays where it is', () => {
  for (const struct of ['lctx_tensor', 'lctx_api']) {
    const offsets = ['magic', 'abi_major', 'abi_minor', 'struct_size'].map((name, i) => `${struct} ${4 * i} uint32_t ${name}`);
    expect(current.lines).toEqual(expect.arrayContaining(offsets));
  }
  expect(current.lines).toEqual(
    expect.arrayContaining([
      'lctx_tensor 16 void (*retain)(struct lctx_tensor* self)',
      'lctx_tensor 24 void (*release)(struct lctx_tensor* self)',
      'lctx_api 16 const char* version',
    ]),
  );
});
