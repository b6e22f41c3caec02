"""Ways to log in to a NATS server: its configuration, and the settings of who comes in.

The JWTs are as nsc would make them: base64url header, claims and signature, parted by dots; the
signature is the issuer's, an ed25519 nkey. Source: docs.nats.io "JWT Authentication", nats-io/jwt
`v2/claims.go` (claims), `v2/header.go` ("ed25519-nkey").
"""

from __future__ import annotations

import json
import os
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nkeys
import trustme

USER = nkeys.PREFIX_BYTE_USER
ACCOUNT = nkeys.PREFIX_BYTE_ACCOUNT
OPERATOR = nkeys.PREFIX_BYTE_OPERATOR

CREDS = """\
-----BEGIN NATS USER JWT-----
{jwt}
------END NATS USER JWT------

-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------
"""

# as nsc writes them: -1 is no limit
NO_JETSTREAM = {
    "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True,
    "conn": -1, "leaf": -1,
}  # fmt: skip
JETSTREAM = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}


@dataclass
class Login:
    """One way in.

    Attributes:
        more: for the servers' configuration.
        settings: of a service that may come in.
        secrets: what must be shown nowhere.
    """

    more: str
    settings: dict[str, Any]
    secrets: list[str] = field(default_factory=list)


class Key:
    """An nkey; `seed` is the secret."""

    def __init__(self, prefix: int) -> None:
        self.seed: str = nkeys.encode_seed(os.urandom(32), prefix).decode()
        self._pair = nkeys.from_seed(bytearray(self.seed.encode()))
        self.public: str = self._pair.public_key.decode()

    def signed(self, subject: str, name: str, nats: dict[str, Any]) -> str:
        """A JWT about a public key, issued by this key."""
        claims = {
            "jti": os.urandom(16).hex(), "iat": 1_700_000_000, "iss": self.public, "name": name,
            "sub": subject, "nats": {**nats, "version": 2},
        }  # fmt: skip
        text = f"{_part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_part(claims)}"
        return f"{text}.{_base64(self._pair.sign(text.encode()))}"


def password(user: str, word: str, permissions: str = "") -> Login:
    """A user of the server's configuration; `permissions` as they stand there."""
    more = passwords({user: (word, permissions)})
    return Login(more, {"nats_user": user, "nats_password": word}, [word])


def passwords(users: dict[str, tuple[str, str]]) -> str:
    """The configuration for several users of one account: passwords and permissions by name."""
    return _account(
        *(
            f"user: {json.dumps(user)}, password: {json.dumps(word)}"
            + (f", permissions {{ {permissions} }}" if permissions else "")
            for user, (word, permissions) in users.items()
        )
    )


def token(text: str) -> Login:
    """A token, which the URL has to hold: `NatsCluster.urls` by `with_login`."""
    return Login(f"authorization {{ token: {json.dumps(text)} }}", {}, [text])


def nkey(folder: Path) -> Login:
    key = Key(USER)
    (file := folder / "user.nk").write_text(f"{key.seed}\n")
    return Login(_account(f"nkey: {key.public}"), {"nats_nkey_file": str(file)}, [key.seed])


def creds(folder: Path) -> Login:
    """Operator, account and user by JWT; the server knows the account by its configuration."""
    operator, system, account, user = Key(OPERATOR), Key(ACCOUNT), Key(ACCOUNT), Key(USER)
    root = operator.signed(operator.public, "operator", {"type": "operator"})
    accounts = {
        key.public: operator.signed(key.public, name, {"type": "account", "limits": limits})
        for key, name, limits in (
            (system, "system", NO_JETSTREAM),
            (account, "datapipe", NO_JETSTREAM | JETSTREAM),
        )
    }
    limits = {"subs": -1, "data": -1, "payload": -1}
    who = account.signed(user.public, "user", {"type": "user", **limits})
    (file := folder / "user.creds").write_text(CREDS.format(jwt=who, seed=user.seed))
    more = (
        f"operator: {root}\nresolver: MEMORY\nsystem_account: {system.public}\n"
        f"resolver_preload: {json.dumps(accounts)}"
    )
    return Login(more, {"nats_creds": str(file)}, [user.seed, who])


def with_login(urls: str, login: str) -> str:
    """The same URLs, each with `user:password` or a token in it."""
    return urls.replace("://", f"://{login}@")


class Authority:
    """Makes certificates for servers and clients; files in a folder."""

    def __init__(self, folder: Path, *hosts: str) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self._authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        self._issue("server", *(hosts or ("127.0.0.1",)))

    def _issue(self, name: str, *hosts: str) -> tuple[str, str]:
        issued = self._authority.issue_cert(*hosts)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        return str(cert), str(key)

    def server(self, *, verify: bool = False) -> str:
        """What stands in the servers' block `tls`; `verify`: clients need certificates."""
        text = f'cert_file: "{self._folder}/server.pem", key_file: "{self._folder}/server.key"'
        return f'{text}, ca_file: "{self._folder}/ca.pem", verify: true' if verify else text

    @property
    def trusted(self) -> dict[str, str]:
        """Settings of a client that trusts us."""
        return {"nats_ca_file": str(self._folder / "ca.pem")}

    def client(self) -> dict[str, str]:
        """Settings of a client with a certificate of ours."""
        cert, key = self._issue("client", "client.example")
        return {**self.trusted, "nats_cert_file": cert, "nats_key_file": key}


def _account(*users: str) -> str:
    # the server's own account has no JetStream
    listed = ", ".join(f"{{ {user} }}" for user in users)
    return f"accounts {{ DATAPIPE {{ jetstream: enabled, users: [ {listed} ] }} }}"


def _part(content: dict[str, Any]) -> str:
    return _base64(json.dumps(content).encode())


def _base64(content: bytes) -> str:
    return urlsafe_b64encode(content).rstrip(b"=").decode()
