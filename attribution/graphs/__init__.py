"""Attribution graphs: computed by `attribute`, held by `Graph`, pruned and scored, and compared with interventions."""
