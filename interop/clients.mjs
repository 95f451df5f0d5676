// The official clients, each in the eras that it speaks, through the same cases,
// with a server that is guarded itself and with one behind the proxy.
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { Client as ClientV1 } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport as TransportV1 } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { CallToolResultSchema, LoggingMessageNotificationSchema } from '@modelcontextprotocol/sdk/types.js';
import { Client as ClientV2, StreamableHTTPClientTransport as TransportV2 } from '@modelcontextprotocol/client';

const who = { name: 'interop', version: '1' };
const denied = { error: 'revoked', reason: 'stolen-token', incident: 'INC-142' };

const v1 = {
  make: () => new ClientV1(who),
  transport: TransportV1,
  version: client => client.transport.protocolVersion,
  onMessage: (client, handle) => client.setNotificationHandler(LoggingMessageNotificationSchema, n => handle(n.params)),
  call: (client, name, options) => client.callTool({ name, arguments: {} }, CallToolResultSchema, options),
};
const v2 = mode => ({
  make: () => new ClientV2(who, { versionNegotiation: { mode } }),
  transport: TransportV2,
  version: client => client.getNegotiatedProtocolVersion(),
  onMessage: (client, handle) => client.setNotificationHandler('notifications/message', n => handle(n.params)),
  call: (client, name, options) => client.callTool({ name, arguments: {} }, options),
});

export const stacks = [
  { name: 'sdk 1.32.2, 2025-11-25', sdk: v1, version: '2025-11-25' },
  { name: 'client 2.4.0, 2025-11-25', sdk: v2('legacy'), version: '2025-11-25' },
  { name: 'client 2.4.0, 2026-07-28', sdk: v2({ pin: '2026-07-28' }), version: '2026-07-28' },
].map(stack => ({ name: stack.name, cases: (url, control) => cases(stack, url, control) }));

function cases({ sdk, version }, url, control) {
  /** A caller with a session of its own, so that the cases leave each other alone. */
  const caller = async () => {
    const session = randomUUID();
    const token = await control('token', { user: 'ann', session });
    return { token, revoke: () => control('revoke', { session }) };
  };
  /** Keeps what the server answered, which not every client shows. */
  const connect = async (token, seen = [], watch = {}) => {
    const client = sdk.make();
    if (watch.said) sdk.onMessage(client, watch.said);
    const transport = new sdk.transport(new URL(url), {
      requestInit: { headers: { Authorization: `Bearer ${token}` } },
      fetch: async (input, init) => {
        const res = await fetch(input, init);
        if (res.ok && init.method === 'GET') watch.opened?.();
        if (!res.ok && res.status !== 405) {
          seen.push({ status: res.status, challenge: res.headers.get('www-authenticate'), body: await res.clone().json().catch(() => null) });
        }
        return res;
      },
    });
    client.onerror = () => {}; // the cases look at what their calls answer
    await client.connect(transport);
    assert.equal(sdk.version(client), version);
    return client;
  };
  const using = async (client, run) => {
    try {
      return await run(client);
    } finally {
      await client.close().catch(() => {});
    }
  };
  const refused = seen => {
    const last = seen.at(-1);
    assert.ok(last, 'the server refused nothing at HTTP');
    assert.equal(last.status, 401);
    assert.match(last.challenge, /^Bearer error="invalid_token", error_description="denied: revoked: stolen-token/);
    assert.match(last.challenge, /resource_metadata="https:/);
    assert.partialDeepStrictEqual(last.body.error, { code: -31401, data: denied });
  };
  /** A call that runs: settled is its outcome, once there is one. */
  const running = (client, tool) => new Promise((resolve, reject) => {
    const settled = sdk.call(client, tool, { onprogress: () => resolve({ settled }), timeout: 20_000 })
      .then(value => ({ value }), error => ({ error }));
    settled.then(out => reject(out.error ?? new Error('it ended before it was cut')));
  });
  const cut = ({ error }) => {
    assert.ok(error, 'the call was answered');
    assert.equal(error.code, -31401, error.stack);
    assert.partialDeepStrictEqual(error.data, denied);
    assert.ok(error.data.seq > 0);
  };

  /** Resolves once the client has opened a stream of its own. */
  const listening = async (token, seen) => {
    const l = { streams: 0, messages: [] };
    const open = new Promise(resolve => { l.opened = () => { l.streams++; resolve(); }; });
    l.told = new Promise(resolve => { l.said = params => { l.messages.push(params); resolve(params); }; });
    l.client = await connect(token, seen, l);
    await open;
    return l;
  };
  const all = {
    'allows': async () => {
      const { token } = await caller();
      await using(await connect(token), async client => {
        const res = await sdk.call(client, 'echo');
        assert.equal(res.content[0].text, 'hello');
      });
    },
    'denies without a token': async () => {
      const seen = [];
      await assert.rejects(connect('garbage', seen));
      assert.equal(seen.at(-1).status, 401);
      assert.match(seen.at(-1).challenge, /error="invalid_token"/);
    },
    'denies at connect': async () => {
      const { token, revoke } = await caller();
      await revoke();
      const seen = [];
      await assert.rejects(connect(token, seen));
      refused(seen);
    },
    'denies in mid-session': async () => {
      const [one, bystander] = [await caller(), await caller()];
      const seen = [];
      await using(await connect(one.token, seen), async client => {
        await using(await connect(bystander.token), async other => {
          await sdk.call(client, 'echo');
          await one.revoke();
          await assert.rejects(sdk.call(client, 'echo'), err => /stolen-token/.test(`${err.message} ${JSON.stringify(err.data ?? '')}`));
          refused(seen);
          assert.equal((await sdk.call(other, 'echo')).content[0].text, 'hello');
        });
      });
    },
    'cuts in mid-call': async () => {
      const { token, revoke } = await caller();
      await using(await connect(token), async client => {
        const { settled } = await running(client, 'wait');
        await revoke();
        cut(await settled);
      });
    },
    'cuts a tool that ignores its context': async () => {
      const [one, bystander] = [await caller(), await caller()];
      await using(await connect(one.token), async client => {
        await using(await connect(bystander.token), async other => {
          const [{ settled }, theirs] = [await running(client, 'stubborn'), await running(other, 'wait')];
          await one.revoke();
          cut(await settled);
          assert.equal(await Promise.race([theirs.settled, sdk.call(other, 'echo').then(() => 'running')]), 'running');
        });
      });
    },
  };
  // 2026-07-28 has no stream but those of calls.
  return version !== '2025-11-25' ? all : { ...all,
    'cuts a stream that answers no call': async () => {
      const [one, bystander] = [await caller(), await caller()];
      const seen = [];
      const [mine, theirs] = [await listening(one.token, seen), await listening(bystander.token)];
      await using(mine.client, () => using(theirs.client, async () => {
        await one.revoke();
        const { level, data } = await mine.told;
        assert.equal(level, 'error');
        assert.partialDeepStrictEqual(data, denied);
        await assert.rejects(sdk.call(mine.client, 'echo'));
        refused(seen);
        assert.equal((await sdk.call(theirs.client, 'echo')).content[0].text, 'hello');
        assert.deepEqual([theirs.streams, theirs.messages], [1, []]);
      }));
    },
  };
}
