// What a user's project runs after an install. Texts of programs: they see installed packages alone.

/** Imports every entry; prints each with the names that it exports. */
export const listing = (entries, load) =>
  `for (const name of ${JSON.stringify(entries)}) console.log(name, Object.keys(${load}).filter((key) => key !== 'default').sort().join());`;

/** Prints milliseconds to import a package, and (for one with an addon) until its native code is there too. */
export const loading = (name, native) => `
const from = performance.now();
const own = await import('@lc/${name}');
const imported = performance.now() - from;
${native ? `const { buildInfo, loadAddon } = ${name === 'tensor' ? 'own' : "await import('@lc/tensor')"}; buildInfo();` : ''}
${
  native && name !== 'tensor'
    ? `loadAddon({ packageName: '@lc/${name}', from: new URL(import.meta.resolve('@lc/${name}')).pathname })();`
    : ''
}
console.log(JSON.stringify([imported, ${native ? 'performance.now() - from' : 'null'}]));`;
