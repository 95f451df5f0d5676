// Processes that are this run's own: each has a folder, writes its log there, and is
// ended by its id.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, openSync, closeSync, readFileSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';

/** An address on loopback that nothing listens on. */
export async function freeAddress() {
  const server = net.createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return `127.0.0.1:${port}`;
}

export class Process {
  /** files are written to dir, for its owner alone, before the program starts there. */
  constructor(dir, files, program, args, env = {}) {
    mkdirSync(dir, { mode: 0o700 });
    for (const [name, text] of Object.entries(files)) writeFileSync(path.join(dir, name), text, { mode: 0o600 });
    this.logFile = path.join(dir, 'log');
    const log = openSync(this.logFile, 'a', 0o600);
    this.child = spawn(program, args, { cwd: dir, env: { ...process.env, ...env }, stdio: ['ignore', log, log] });
    closeSync(log);
    this.exited = once(this.child, 'exit').then(([code, signal]) => signal ?? code, err => err);
  }

  /** Waits until url answers, with status where that is given. */
  async ready(url, status) {
    const over = performance.now() + 30_000;
    let ended;
    this.exited.then(how => { ended = how; });
    while (performance.now() < over && ended === undefined) {
      const res = await fetch(url).catch(() => null);
      await res?.body?.cancel();
      if (res && res.status === (status ?? res.status)) return this;
      await new Promise(resolve => setTimeout(resolve, 20));
    }
    await this.stop();
    throw new Error(`${this.child.spawnfile} ${ended === undefined ? 'is not ready in time' : `ended with ${ended}`}:\n${this.log().slice(-4096)}`);
  }

  log() { return readFileSync(this.logFile, 'utf8'); }

  /** Ends it in order, and returns how it ended: 0 is well. */
  async stop() {
    this.child.kill('SIGTERM');
    const timer = setTimeout(() => this.child.kill('SIGKILL'), 10_000);
    try {
      return await this.exited;
    } finally {
      clearTimeout(timer);
    }
  }
}
