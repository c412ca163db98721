"""The `clt` command: arguments, help texts and printed reports of each verb."""
