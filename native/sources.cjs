// Lists files for gyp, relative to packages/<name>/native (the working directory): `cc`, `cu`, or the `headers` that a kernel may include.
const { existsSync, readdirSync } = require('node:fs');
const { join } = require('node:path');

const kind = process.argv[2];
const list = (dir, pattern) =>
  existsSync(dir)
    ? readdirSync(dir)
        .filter((name) => pattern.test(name))
        .sort()
        .map((name) => (dir === '.' ? name : join(dir, name)))
    : [];
const files =
  kind === 'headers'
    ? [...list('.', /\.(h|cuh)$/), ...list('../../../native/include/lctx', /\.(h|cuh)$/)]
    : list('.', new RegExp(`\\.${kind}$`));
process.stdout.write(files.join('\n'));
