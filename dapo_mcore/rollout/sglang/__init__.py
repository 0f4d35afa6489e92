"""SGLang servers: started, spoken to, kept in step with the weights, and replaced when they die.

engine → replies                    samples: asked for, checked, retried
engine → transfer (disk, broadcast, tensor)
                                    weights: one transaction over the fleet
fleet → member → server_api → http  who serves, and how it is spoken to
servers → process, ray_servers      servers of the run's own
"""
