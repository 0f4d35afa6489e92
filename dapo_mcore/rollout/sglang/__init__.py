"""The rollout engine on SGLang servers. README.md in this folder explains it to users.

Each folder imports only those before it:

    client    one server over HTTP: endpoints, answers, versions          a new SGLang: client/api.py, client/versions.py
    launch    starting servers here or by Ray                             options of a server: launch/servers.py
    pool      which servers serve, move to new weights, come back         when a server is given up: pool/recovery.py
    sync      how weights reach them: disk, distributed, tensor           a new way: a Sender (sync/sender.py)
              from one rank or several leaders                        what rank 0 asks of them: sync/leader.py
              or changed values alone, applied in SGLang by server_side   the form of a change: server_side/dapo_mcore_delta.py
    assembly  the parts of an engine, each server checked at start        a new condition on servers
    engine    samples asked for, checked and retried; weights sent        what becomes of a failed sample

One weight sync: handover.py → engine.update_weights → pool.update (a transaction) and a sender → client/api.py → client/http.py
"""
