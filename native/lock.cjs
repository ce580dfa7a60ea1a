// locked(file, work): one process at a time. The file holds its owner's pid, so that the lock of a process that died does not count.
const { linkSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } = require('node:fs');

const sleep = (ms) => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
const NEW_MS = 5000;

function content(file) {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return null;
  }
}

/** Whether a lock's owner is gone. One without a pid is being made this moment, unless it is old. */
function isStale(file, text) {
  const pid = Number(text);
  try {
    if (!pid) return Date.now() - statSync(file).mtimeMs > NEW_MS;
    process.kill(pid, 0);
    return false;
  } catch (error) {
    return error.code === 'ESRCH';
  }
}

/** Removes a dead owner's lock. What is moved away is looked at again: it may be the lock of somebody who was faster, and then goes back. */
function removeStale(file, text) {
  const aside = `${file}.${process.pid}`;
  try {
    renameSync(file, aside);
    if (content(aside) !== text) linkSync(aside, file);
  } catch {}
  rmSync(aside, { force: true });
}

function locked(file, work) {
  for (let told = false; ; ) {
    try {
      writeFileSync(file, String(process.pid), { flag: 'wx' });
      break;
    } catch (error) {
      if (error.code !== 'EEXIST') throw error;
    }
    const text = content(file);
    if (text === null) continue; // just given back
    if (isStale(file, text)) {
      removeStale(file, text);
      continue;
    }
    if (!told) console.log(`${file}: process ${text} is building; waiting for it`);
    told = true;
    sleep(100);
  }
  try {
    return work();
  } finally {
    rmSync(file, { force: true });
  }
}

module.exports = { locked };
