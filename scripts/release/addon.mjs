// What a published addon must be, read from the file itself: nothing here loads it.
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';

/** The newest glibc symbols that an addon may need: RHEL 9, Ubuntu 22.04, Debian 12. libgcc stays shared: linked in, it needs 2.35 (`_dl_find_object`). */
export const GLIBC_FLOOR = '2.34';
/** Bytes that a package may take to download. */
export const TARBALL_LIMIT = 6e6;
const NEEDED = ['libc.so.6', 'libm.so.6', 'libgcc_s.so.1', 'ld-linux-x86-64.so.2', 'libdl.so.2', 'librt.so.1', 'libpthread.so.0'];
const EXPORTS = ['lc_build_info', 'napi_register_module_v1', 'node_api_module_get_api_version_v1'];
const EXPORTED_BY = { tensor: ['lctx_tensor_api_v1'] };

const tool = (command, args) => execFileSync(command, args, { encoding: 'utf8', maxBuffer: 64 << 20 });

/** What `native/build_info.cc` put into it. */
export function buildInfo(bytes) {
  const json = /lc_build_info (\{[^}]*\})/.exec(bytes.toString('latin1'))?.[1];
  return json && JSON.parse(json);
}

/**
 * GPU code in an ELF file: `sm_80` for a cubin, `compute_120` for PTX (the `a` of `90a` is not told).
 * A fat binary is a header (u32 magic, u16 version, u16 header bytes, u64 bytes), then per code a header (u16 kind: 1 PTX, 2 cubin; u16; u32 header bytes;
 * u64 bytes; u32; u32; u16; u16; u32 architecture; ...) and the code.
 */
export function gpuCode(bytes) {
  const found = new Map();
  const magic = Buffer.from([0x50, 0xed, 0x55, 0xba]);
  for (let at = bytes.indexOf(magic); at >= 0; at = bytes.indexOf(magic, at + 4)) {
    if (at + 16 > bytes.length || bytes.readUInt16LE(at + 6) !== 16) continue; // the same four bytes by chance
    const end = at + 16 + Number(bytes.readBigUInt64LE(at + 8));
    for (let p = at + 16; p + 32 <= Math.min(end, bytes.length); ) {
      const name = `${bytes.readUInt16LE(p) === 1 ? 'compute' : 'sm'}_${bytes.readUInt32LE(p + 28)}`;
      const size = bytes.readUInt32LE(p + 4) + Number(bytes.readBigUInt64LE(p + 8));
      if (size <= 0) break;
      found.set(name, (found.get(name) ?? 0) + size);
      p += size;
    }
  }
  return found;
}

/** `80,90a` -> the code that has to be there: a cubin for each, PTX of the last plain one (native/nvcc.cjs). */
export function expectedCode(targets) {
  const plain = targets.filter((target) => /^\d+$/.test(target)).sort((a, b) => a - b);
  return [...targets.map((target) => `sm_${target.replace(/\D$/, '')}`), ...plain.slice(-1).map((target) => `compute_${target}`)];
}

const byVersion = (a, b) => a.localeCompare(b, 'en', { numeric: true });
export const glibc = (file) =>
  [...tool('objdump', ['-T', file]).matchAll(/\(GLIBC_([\d.]+)\)/g)]
    .map((m) => m[1])
    .sort(byVersion)
    .at(-1) ?? '0';

/** `{ info, code, glibc, problems }` of an addon; `targets`: those that it was to be built for, null for an addon without CUDA code. */
export function inspect(name, file, { version, targets }) {
  const bytes = readFileSync(file);
  const problems = [];
  const info = buildInfo(bytes);
  if (!info) problems.push('has no lc_build_info');
  else {
    if (info.version !== version)
      problems.push(`says version ${info.version}, its package has ${version}: build it after \`npm run version\``);
    if ((info.cudaTargets ?? null) !== (targets?.join() ?? null))
      problems.push(`says targets ${info.cudaTargets ?? 'none'}, wanted ${targets?.join() ?? 'none'}`);
  }
  const code = gpuCode(bytes);
  const missing = expectedCode(targets ?? []).filter((target) => !code.has(target));
  if (missing.length > 0) problems.push(`has no GPU code for ${missing.join(', ')}`);
  const floor = glibc(file);
  if (byVersion(floor, GLIBC_FLOOR) > 0) problems.push(`needs glibc ${floor}, the floor is ${GLIBC_FLOOR}`);

  const dynamic = tool('readelf', ['-dW', file]);
  const foreign = [...dynamic.matchAll(/\(NEEDED\).*\[(.*)\]/g)].map((m) => m[1]).filter((library) => !NEEDED.includes(library));
  if (foreign.length > 0) problems.push(`needs ${foreign.join(', ')}`);
  if (!/FLAGS_1.*NODELETE/.test(dynamic)) problems.push('is not linked with -z nodelete');
  const wanted = [...EXPORTS, ...(EXPORTED_BY[name] ?? [])].sort().join(' ');
  const exported = tool('nm', ['-D', '--defined-only', '--format=posix', file])
    .split('\n')
    .map((line) => line.split(' ')[0].split('@')[0])
    .filter(Boolean)
    .sort()
    .join(' ');
  if (exported !== wanted) problems.push(`exports ${exported}, wanted ${wanted}`);
  if (/\.(symtab|debug_info)\b/.test(tool('readelf', ['-SW', file]))) problems.push('is not stripped');
  return { info, code, glibc: floor, problems };
}
