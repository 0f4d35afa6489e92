"""From a response to its score: answer rules, plug-ins, overlong punishment, and a pool with hard deadlines."""
