"""`python -m flyp_plugin COMMAND` is `flyp COMMAND`."""

from flyp_plugin.commands import main

main()
