"""`mmtok soak`: injects faults into real servers, and checks how they behave afterwards.

`command` runs the rows of `faults`, each a fault and what must hold; a row's code is in the file of its kind: `fuzz`,
`storm`, `images`, `event_loop`, `agent`, `weights`, `killing`, `injected`, `artifacts`, `drift`. A row counts
and reports by its `trial`; `fixed_chats` are asked before and after each row; `table` writes docs/reliability.md.
Faults inside a server come with a `second_plugin`, as in tests. It runs in a checkout, and is in no wheel.
"""
