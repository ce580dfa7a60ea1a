/** Errors as exit codes and text. */
import { LcError } from '@lc/tensor';

/** Codes that mean "what you gave me is wrong", not "the run failed". */
const badInput = new Set([
  'ERR_LC_ADAPTER',
  'ERR_LC_ARGUMENT',
  'ERR_LC_CONFIG',
  'ERR_LC_DATA',
  'ERR_LC_DTYPE',
  'ERR_LC_MODEL',
  'ERR_LC_NOTHING_SUPERVISED',
  'ERR_LC_SAFETENSORS',
  'ERR_LC_SHAPE',
  'ERR_LC_TEMPLATE',
  'ERR_LC_TOKENIZER',
]);

/** 2 bad input, 3 will not fit, 1 everything else. */
export function exitCodeOf(error: unknown): number {
  const code = (error as { code?: unknown } | null)?.code;
  if (code === 'ERR_LC_PLAN') return 3;
  return typeof code === 'string' && badInput.has(code) ? 2 : 1;
}

/** To stderr for people; with `--json` also as an object on stdout. */
export function printError(error: unknown, json: boolean): void {
  const { code, message, stack } = error as { code?: string; message?: string; stack?: string };
  const known = typeof code === 'string' && code.startsWith('ERR_LC_');
  if (json)
    process.stdout.write(
      `${JSON.stringify({ schema: 1, type: 'error', error: { code: known ? code : 'ERR_INTERNAL', message: message ?? String(error) } })}\n`,
    );
  process.stderr.write(known ? `${code}: ${message}\n` : `${stack ?? message ?? String(error)}\n`);
}

/** A whole number from the command line. */
export function wholeNumber(name: string, text: string, min = 0): number {
  const n = Number(text);
  if (!Number.isSafeInteger(n) || n < min)
    throw new LcError('ERR_LC_CONFIG', `${name}: expected a whole number of at least ${min}, got '${text}'`);
  return n;
}

/** '24GiB', '512MiB', '80GB' or plain bytes. */
export function parseBytes(name: string, text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*(B|[KMGT]i?B)?$/i.exec(text.trim());
  const units: Record<string, number> = {
    b: 1,
    kb: 1e3,
    mb: 1e6,
    gb: 1e9,
    tb: 1e12,
    kib: 2 ** 10,
    mib: 2 ** 20,
    gib: 2 ** 30,
    tib: 2 ** 40,
  };
  const factor = units[(match?.[2] ?? 'B').toLowerCase()];
  if (!match || factor === undefined) throw new LcError('ERR_LC_CONFIG', `${name}: expected bytes like 24GiB or 512MiB, got '${text}'`);
  return Math.floor(Number(match[1]) * factor);
}
