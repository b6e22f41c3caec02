// Calls iron_mq on order. A line in: {"queue": name or null, "call": method, "args": [...]}.
// A line out: {"ok": what the client handed back} or {"error": its message}.
const { Client } = require("iron_mq");

const [host, port, project_id, token] = process.argv.slice(2);
const client = new Client({ scheme: "http", host, port, project_id, token });

require("readline")
  .createInterface({ input: process.stdin })
  .on("line", (line) => {
    const { queue, call, args } = JSON.parse(line);
    const target = queue === null ? client : client.queue(queue);
    let told = false; // 0.9.3 calls back twice from most calls: cb(cb(error, body))
    target[call](...args, (error, body) => {
      if (!told) console.log(JSON.stringify(error ? { error: error.message } : { ok: body }));
      told = true;
    });
  });
